"""Preparation: the same bytes after any number of kills, with any number of processes; verify and info."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import ROOT, TESTS
from support.data_cases import (
    edm_zip,
    image_folder,
    latent_shards,
    moments,
    npy,
    picture,
    png,
    prepared,
    run_prepare,
    tree,
)

from diffratio_fast.data import writer
from diffratio_fast.data.shards import ShardDataSet
from diffratio_fast.data.sources import whole_train
from diffratio_fast.data.sources.sizes import proposed_resolution
from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import lock

COMMAND = (sys.executable, "-m", "diffratio_fast.prepare")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}


def records_of(directory: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    data = ShardDataSet(directory)
    records, labels = data.read(np.arange(*data.manifest.splits[split]))
    return records.numpy(), labels.numpy()


def test_every_image_is_there_once_with_its_label(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    seen = []
    for split in ("train", "validation", "test"):
        for record, label in zip(*records_of(directory, split), strict=True):
            seen.append((record.tobytes(), int(label)))
    expected = [(picture(1000 * c + i).transpose(2, 0, 1).tobytes(), c) for c in range(3) for i in range(20)]
    assert sorted(seen) == sorted(expected) and seen != expected


def test_manifest_describes_the_data(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    manifest = ShardDataSet(directory).manifest
    assert manifest.splits == {"train": (0, 48), "validation": (48, 54), "test": (54, 60)}
    assert [s.records for s in manifest.shards] == [7] * 8 + [4]
    assert manifest.scaling.mean == (127.5,) and manifest.scaling.std == (63.75,)
    train, _ = records_of(directory, "train")
    np.testing.assert_allclose(manifest.statistics.mean, train.mean((0, 2, 3)))
    np.testing.assert_allclose(manifest.statistics.std, train.std((0, 2, 3)))
    np.testing.assert_allclose(manifest.statistics.max, train.max((0, 2, 3)))
    assert sorted(p.name for p in directory.iterdir()) == sorted(
        ["manifest.json", "labels.npy", "checksums.npy", *(s.file for s in manifest.shards)]
    )


def test_measured_scaling_gives_standard_deviation_one_half(tmp_path: Path) -> None:
    assert run_prepare(image_folder(tmp_path / "x"), tmp_path / "d", "--scaling", "measured") == 0
    records, _ = records_of(tmp_path / "d", "train")
    import torch

    x0 = ShardDataSet(tmp_path / "d").scaling.to_model(torch.from_numpy(records))
    assert abs(float(x0.mean())) < 1e-5 and abs(float(x0.std(correction=0)) - 0.5) < 1e-5


# ------------------------------------------------------------------------------------ interruption


@pytest.mark.slow
def test_killed_at_every_step_the_bytes_are_the_same(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    script = TESTS / "support" / "kill_points.py"
    result = subprocess.run(
        [sys.executable, script, tmp_path / "images", tmp_path / "killed", str(192 * 7)],
        capture_output=True, text=True, check=True, env=ENVIRONMENT,
    )  # fmt: skip
    killed, status, *leftovers = result.stdout.splitlines()[-1].split()
    assert int(killed) >= 20 and status == "0" and not leftovers
    assert tree(tmp_path / "killed") == tree(directory)


@pytest.mark.slow
def test_the_command_killed_and_rerun_gives_the_same_bytes(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", classes=2, per_class=200, size=64)
    arguments = ("--shard-bytes", str(3 * 64 * 64 * 5), "--workers", "1")
    assert run_prepare(source, tmp_path / "whole", *arguments) == 0
    command = [*COMMAND, source, tmp_path / "killed", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=ENVIRONMENT)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("partial/*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert run_prepare(source, tmp_path / "killed", *arguments) == 0
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")


@pytest.mark.slow
def test_processes_share_the_work(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    processes = [
        subprocess.Popen(
            [*COMMAND, tmp_path / "images", tmp_path / "shared", "--shard-bytes", str(192 * 7)],
            env=ENVIRONMENT | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]  # fmt: skip
    assert [process.wait() for process in processes] == [0, 0]
    assert tree(tmp_path / "shared") == tree(directory)


def test_a_late_process_finds_it_finished(tmp_path: Path) -> None:
    """Threads stand for processes (a lock belongs to an open file) and switch as often as possible."""
    order = writer.Entries(np.arange(4), np.zeros(4, bool), np.array([0, 0, 1, 2]), np.zeros(4, np.int64))
    plan = writer.Plan("squares", "image", (1, 2, 2), ("a",), "edm", 4, 0, False, None, {})

    def read(entries: writer.Entries) -> writer.Records:
        return (np.full(plan.shape, index, np.uint8) for index in entries.index)

    def take_part(destination: Path, part: float) -> None:
        writer.write_shards(destination, plan, order, read, skip_unreadable=False, part=part)

    take_part(tmp_path / "alone", 0)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(3) as pool:
            for attempt in range(40):
                together = tmp_path / str(attempt)
                list(pool.map(take_part, [together] * 3, (0, 1 / 3, 2 / 3)))
                assert tree(together) == tree(tmp_path / "alone")
    finally:
        sys.setswitchinterval(interval)


def test_a_shard_lost_while_unfinished_is_written_again(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    before = tree(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(UserError, match="not empty and not a data set in progress"):
        run_prepare(tmp_path / "images", directory, "--shard-bytes", 192 * 7)
    (directory / "partial").mkdir()
    (directory / "shard-00004.bin").write_bytes(b"")
    assert run_prepare(tmp_path / "images", directory, "--shard-bytes", 192 * 7) == 0
    assert tree(directory) == before


def test_a_rerun_changes_nothing_and_other_options_are_refused(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in directory.iterdir()}
    assert run_prepare(tmp_path / "images", directory, "--shard-bytes", 192 * 7) == 0
    assert {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in directory.iterdir()} == before
    with pytest.raises(UserError, match="contains another data set"):
        run_prepare(tmp_path / "images", directory, "--shard-bytes", 192 * 7, "--seed", 1)
    (tmp_path / "images" / "class0" / "000.png").unlink()
    with pytest.raises(UserError, match="contains another data set"):
        run_prepare(tmp_path / "images", directory, "--shard-bytes", 192 * 7)


def test_begun_with_other_options(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images")
    (folder / "class1" / "007.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"unreadable: class1/007\.png"):
        run_prepare(folder, tmp_path / "d", "--shard-bytes", 192)
    with pytest.raises(UserError, match="begun with other options"):
        run_prepare(folder, tmp_path / "d", "--shard-bytes", 192, "--seed", 3)
    assert not (tmp_path / "d" / "manifest.json").exists()
    assert not list((tmp_path / "d").glob("*.tmp"))


# -------------------------------------------------------------------------------------- unreadable


def test_unreadable_images_are_listed_and_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "images")
    for name in ("class0/003.png", "class2/011.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:50])
    (folder / "class1" / "019.png").write_bytes(png(picture(0, 9, 8)))
    options = ("--unreadable", "skip", "--shard-bytes", 192 * 7)
    assert run_prepare(folder, tmp_path / "d", *options) == 0
    assert "3 unreadable records skipped" in capsys.readouterr().out
    lines = (tmp_path / "d" / "unreadable.txt").read_text().splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [
        "class0/003.png",
        "class1/019.png",
        "class2/011.png",
    ]
    data = ShardDataSet(tmp_path / "d", verify="always")
    assert sum(data.count(s) for s in ("train", "validation", "test")) == 57
    assert sum(len(x) for s in data.manifest.splits for x, _ in data.batches(s, 8, seed=0, epochs=1)) == 57
    assert run_prepare("--verify", tmp_path / "d") == 0


def test_nothing_readable(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "a"
    folder.mkdir(parents=True)
    (folder / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="no record can be read"):
        run_prepare(tmp_path / "images", tmp_path / "d", "--unreadable", "skip")


# ------------------------------------------------------------------------------------- other routes


def test_a_second_source_is_the_test_set(tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train", classes=2, per_class=10)
    test = tmp_path / "test"
    for c in range(2):
        (test / f"class{c}").mkdir(parents=True)
        (test / f"class{c}" / "t.png").write_bytes(png(picture(77 + c)))
    assert run_prepare(train, tmp_path / "d", "--test-source", test, "--validation", "5") == 0
    records, labels = records_of(tmp_path / "d", "test")
    assert sorted(labels.tolist()) == [0, 1] and ShardDataSet(tmp_path / "d").count("train") == 15
    assert {r.tobytes() for r in records} == {picture(77 + c).transpose(2, 0, 1).tobytes() for c in range(2)}
    (test / "class9").mkdir()
    (test / "class9" / "t.png").write_bytes(png(picture(99)))
    with pytest.raises(UserError, match="--test-source: class names"):
        run_prepare(train, tmp_path / "e", "--test-source", test)


def test_class_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "x")
    assert run_prepare(folder, tmp_path / "d", "--class-names", "cat, dog, bird") == 0
    assert ShardDataSet(tmp_path / "d").class_names == ("cat", "dog", "bird")
    with pytest.raises(UserError, match="2 names; expected at least 3"):
        run_prepare(folder, tmp_path / "e", "--class-names", "cat,dog")


def test_images_of_many_sizes_become_square(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "a"
    folder.mkdir(parents=True)
    for i in range(20):
        (folder / f"{i}.png").write_bytes(png(picture(i, 20 + i, 40 - i)))
    with pytest.raises(UserError, match="--resolution"):
        run_prepare(tmp_path / "x", tmp_path / "d")
    assert run_prepare(tmp_path / "x", tmp_path / "e", "--resolution", 16) == 0
    assert ShardDataSet(tmp_path / "e").shape == (3, 16, 16)


def test_moments_become_float16(tmp_path: Path) -> None:
    directory = latent_shards(tmp_path)
    data = ShardDataSet(directory)
    assert data.kind == "latent_moments" and data.shape == (8, 4, 4) and data.scaling.low is None
    stored = {r.tobytes() for s in data.manifest.splits for r in records_of(directory, s)[0]}
    assert stored == {moments(i).astype(np.float16).tobytes() for i in range(40)}


def test_moments_of_another_vae_are_scaled_by_what_is_measured(tmp_path: Path) -> None:
    data = ShardDataSet(latent_shards(tmp_path, "--vae-name", "someone/vae"))
    assert data.vae is not None and data.vae.name == "someone/vae"
    records = records_of(tmp_path / "latents", "train")[0].astype(np.float64)
    mean, std = records[:, :4], records[:, 4:]
    np.testing.assert_allclose(data.scaling.mean, mean.mean((0, 2, 3)), rtol=1e-6)
    expected = np.sqrt(mean.var((0, 2, 3)) + np.square(std).mean((0, 2, 3)))
    np.testing.assert_allclose(data.scaling.std, expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [(0, 7e4, "larger than the float16 maximum"), (3, np.nan, "not finite"), (100, -1.0, "negative")],
)
def test_moments_out_of_range_are_found_before_the_cast(
    tmp_path: Path, position: int, value: float, message: str
) -> None:
    bad = moments(1)
    bad.reshape(-1)[position] = value
    members = {f"{i}.npy": npy(moments(i)) for i in range(20)} | {"bad.npy": npy(bad)}
    archive = edm_zip(tmp_path / "x.zip", members)
    with pytest.raises(UserError, match=rf"unreadable: bad\.npy: .*{message}"):
        run_prepare(archive, tmp_path / "d")
    assert run_prepare(archive, tmp_path / "e", "--unreadable", "skip") == 0
    assert ShardDataSet(tmp_path / "e").manifest.records == 20


# ------------------------------------------------------------------------------------------- VAE


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random ``AutoencoderKL`` of the real class: 16 x 16 images, latents [4, 4, 4]."""
    diffusers = pytest.importorskip("diffusers")
    import torch

    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    directory = tmp_path_factory.mktemp("vae") / "tiny-vae"
    model.save_pretrained(directory)
    return directory


def test_images_become_latents(tmp_path: Path, vae: Path) -> None:
    import torch
    from diffusers import AutoencoderKL

    source = image_folder(tmp_path / "images", classes=2, per_class=12, size=16)
    options = ("--vae", vae, "--vae-batch", 5, "--mirrors", "--shard-bytes", 4000, "--device", "cpu")
    assert run_prepare(source, tmp_path / "d", *options) == 0
    data = ShardDataSet(tmp_path / "d")
    assert data.shape == (8, 4, 4) and data.vae is not None and data.vae.name == "tiny-vae"
    assert len(data.vae.sha256) == 64
    assert (data.count("train"), data.count("validation"), data.count("test")) == (40, 2, 2)
    model = AutoencoderKL.from_pretrained(vae)
    images = np.stack([picture(1000 * c + i, 16, 16) for c in range(2) for i in range(12)])
    expected = {}
    with torch.no_grad():
        for mirrored in (False, True):
            x = torch.from_numpy(images.transpose(0, 3, 1, 2).astype(np.float32)) / 255
            posterior = model.encode(x.flip(3) if mirrored else x).latent_dist
            for i in range(24):
                expected[i, mirrored] = torch.cat([posterior.mean[i], posterior.std[i]]).numpy()
    train = [
        (r.astype(np.float32), label) for r, label in zip(*records_of(tmp_path / "d", "train"), strict=True)
    ]
    found = []
    for record, label in train:
        key = min(expected, key=lambda k: float(np.abs(expected[k] - record).max()))
        np.testing.assert_allclose(record, expected[key], rtol=2e-3, atol=2e-3)
        assert label == key[0] // 12
        found.append(key)
    assert len(set(found)) == 40  # every training image, unchanged and mirrored
    assert {i for i, m in found if m} == {i for i, m in found if not m}
    before = tree(tmp_path / "d")
    (tmp_path / "d" / "manifest.json").unlink()
    (tmp_path / "d" / "partial").mkdir()
    assert run_prepare(source, tmp_path / "d", *options) == 0
    assert tree(tmp_path / "d") == before
    assert run_prepare(source, tmp_path / "bf16", *options, "--vae-precision", "bf16") == 0
    assert run_prepare("--verify", tmp_path / "bf16") == 0


def test_vae_errors(tmp_path: Path, vae: Path) -> None:
    source = image_folder(tmp_path / "images", size=16)
    with pytest.raises(UserError, match="not a directory of an AutoencoderKL"):
        run_prepare(source, tmp_path / "d", "--vae", tmp_path)
    with pytest.raises(UserError, match="not the published weights"):
        run_prepare(source, tmp_path / "d", "--vae", vae, "--vae-name", "stabilityai/sd-vae-ft-mse")
    with pytest.raises(UserError, match="--mirrors needs --vae"):
        run_prepare(source, tmp_path / "d", "--mirrors")
    with pytest.raises(UserError, match="--device nonsense"):
        run_prepare(source, tmp_path / "d", "--vae", vae, "--device", "nonsense")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((vae / "config.json").read_bytes())
    weights = (vae / "diffusion_pytorch_model.safetensors").read_bytes()
    (broken / "diffusion_pytorch_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(UserError, match="cannot be loaded"):
        run_prepare(source, tmp_path / "d", "--vae", broken)
    assert not (tmp_path / "d").exists()


# --------------------------------------------------------------------------------- verify and info


def test_verify_finds_everything_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = prepared(tmp_path)
    assert run_prepare("--verify", directory) == 0
    assert "60 records, no damage found" in capsys.readouterr().out
    content = bytearray((directory / "shard-00002.bin").read_bytes())
    content[192 * 3] ^= 1
    (directory / "shard-00002.bin").write_bytes(content)
    (directory / "shard-00005.bin").unlink()
    (directory / "shard-00006.bin").write_bytes(b"short")
    labels = np.load(directory / "labels.npy")
    labels[5] = 0 if labels[5] else 1
    np.save(directory / "labels.npy", labels)
    with pytest.raises(UserError, match="4 problems"):
        run_prepare("--verify", directory)
    out = capsys.readouterr().out
    for line in (
        r"shard-00002\.bin: record 17 \(number 3 of this shard\) is damaged",
        r"shard-00005\.bin: missing",
        r"shard-00006\.bin: truncated",
        r"labels\.npy: sha256",
    ):
        assert re.search(line, out)


def test_verify_finds_a_checksum_file_that_was_changed(tmp_path: Path) -> None:
    directory = prepared(tmp_path)
    checksums = np.load(directory / "checksums.npy")
    checksums[3] ^= np.uint64(1)
    np.save(directory / "checksums.npy", checksums)
    with pytest.raises(UserError, match="problems"):
        run_prepare("--verify", directory)


@pytest.mark.parametrize("kind", ["image", "latent_moments"])
def test_info_describes_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    directory = prepared(tmp_path) if kind == "image" else latent_shards(tmp_path)
    assert run_prepare("--info", directory, "--sheet", tmp_path / "sheet.png") == 0
    out = capsys.readouterr().out
    data = ShardDataSet(directory)
    assert (
        kind in out
        and f"train {data.count('train')}" in out
        and f"{data.manifest.statistics.std[1]:.4g}" in out
    )
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    if kind == "image":  # the sheet has the first picture of the first class, enlarged six times
        records, labels = records_of(directory, "train")
        first = records[labels == 0][0].transpose(1, 2, 0)
        np.testing.assert_array_equal(sheet[3 : 3 + 48 : 6, 3 : 3 + 48 : 6], first)
    else:
        assert "VAE: stabilityai/sd-vae-ft-mse" in out and sheet.std() > 10


# ------------------------------------------------------------------------------------ command line


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["absent", "d"],
        ["."],
        ["x", "y", "--workers", "0"],
        ["x", "y", "--crop", "round"],
        ["--verify", "absent"],
        ["--info", "a", "--verify", "b"],
    ],
)
def test_bad_command_lines(tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        run_prepare(*arguments)
    assert not list(tmp_path.iterdir())


def test_errors_are_one_line_and_status_2(tmp_path: Path) -> None:
    result = subprocess.run(
        [*COMMAND, tmp_path / "absent", tmp_path / "d"], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert result.returncode == 2 and result.stdout == ""
    assert [line for line in result.stderr.splitlines() if line.startswith("error: ")] == [
        f"error: {tmp_path / 'absent'}: no such file or directory"
    ]


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    content = json.loads((prepared(tmp_path) / "manifest.json").read_text())
    assert content["version"] == 1 and content["kind"] == "image" and content["records"] == 60


# ------------------------------------------------------------------------------ pictures of one's own


def mixed_folder(root: Path) -> Path:
    root.mkdir()
    for number, (height, width) in enumerate([(90, 70), (80, 120), (64, 64), (200, 70)] * 3):
        (root / f"{number:02d}.png").write_bytes(png(picture(number, height, width)))
    return root


def test_mixed_sizes_are_found_before_anything_is_written(tmp_path: Path) -> None:
    source = mixed_folder(tmp_path / "photos")
    with pytest.raises(UserError, match=r"4 different sizes, from 64 x 64 .*--resolution 64"):
        run_prepare(source, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert run_prepare(source, tmp_path / "d", "--resolution", "64") == 0
    assert ShardDataSet(tmp_path / "d").shape == (3, 64, 64)


def test_mixed_sizes_in_an_archive(tmp_path: Path) -> None:
    members = {f"{i}.png": png(picture(i, 40 + i % 2, 40)) for i in range(12)}
    with pytest.raises(UserError, match=r"2 different sizes.*--resolution 32"):
        run_prepare(edm_zip(tmp_path / "x.zip", members), tmp_path / "d")
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("shorter", "resolution"), [([100] * 50, 64), ([63] * 50, 32), ([3] * 50, 16), ([3] + [500] * 50, 64)]
)
def test_the_proposed_resolution_is_one_that_nearly_all_images_have(
    shorter: list[int], resolution: int
) -> None:
    assert proposed_resolution([(side, 2 * side) for side in shorter]) == resolution


def test_an_attempt_that_wrote_no_shard_locks_nothing(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", classes=2)
    (source / "class0" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="not an image of a known format") as error:
        run_prepare(source, tmp_path / "d")
    assert "BytesIO" not in str(error.value)
    assert run_prepare(source, tmp_path / "d", "--unreadable", "skip", "--resolution", "4") == 0
    assert ShardDataSet(tmp_path / "d").shape == (3, 4, 4)


def test_a_shard_being_written_keeps_other_options_out(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", classes=2)
    (source / "class0" / "000.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="unreadable"):
        run_prepare(source, tmp_path / "d")
    with (
        lock(tmp_path / "d" / "partial" / "shard-00000.lock"),
        pytest.raises(UserError, match="begun with other options"),
    ):
        run_prepare(source, tmp_path / "d", "--resolution", "4", "--unreadable", "skip")


def test_a_folder_of_documents_is_no_data_set(tmp_path: Path) -> None:
    folder = tmp_path / "documents"
    folder.mkdir()
    (folder / "logo.png").write_bytes(png(picture(0)))
    for number in range(5):
        (folder / f"letter{number}.txt").write_text("Dear")
    with pytest.raises(UserError, match=r"1 image \(logo.png\) among 5 other files"):
        run_prepare(folder, tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert run_prepare(folder, tmp_path / "d", "--format", "folder") == 0


def test_captions_beside_images_are_no_other_files(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "images", classes=1, per_class=3)
    for number in range(3):
        for suffix in ("txt", "json"):
            (source / "class0" / f"{number:03d}.{suffix}").write_text("{}")
    assert run_prepare(source, tmp_path / "d") == 0


def test_a_protocol_keeps_the_training_set_whole(tmp_path: Path) -> None:
    train = image_folder(tmp_path / "train", classes=2)
    test = image_folder(tmp_path / "test", classes=2, per_class=10)
    options = ("--test-source", test, "--protocol", "fid")
    assert run_prepare(train, tmp_path / "d", *options) == 0
    data = ShardDataSet(tmp_path / "d")
    assert [data.count(split) for split in ("train", "validation", "test")] == [40, 10, 10]
    assert run_prepare(train, tmp_path / "few", *options, "--validation", "3") == 0
    data = ShardDataSet(tmp_path / "few")
    assert [data.count(split) for split in ("train", "validation", "test")] == [40, 3, 17]
    with pytest.raises(UserError, match="the source has no test records; set --test-source"):
        run_prepare(train, tmp_path / "e", "--protocol", "fid")
    with pytest.raises(UserError, match="omit --test"):
        run_prepare(train, tmp_path / "e", *options, "--test", "3")
    with pytest.raises(UserError, match="lower --validation"):
        run_prepare(train, tmp_path / "e", *options, "--validation", "20")


def test_a_protocol_with_a_validation_split_of_the_source() -> None:
    splits = np.array([0] * 5 + [1] * 4, np.uint8)
    assert np.bincount(whole_train(splits, None, 0)).tolist() == [5, 2, 2]
    both = np.array([0] * 5 + [1] * 4 + [2] * 3, np.uint8)
    assert np.array_equal(whole_train(both, None, 0), both)
    with pytest.raises(UserError, match="omit --validation"):
        whole_train(both, "2", 0)
