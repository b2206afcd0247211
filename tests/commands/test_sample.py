"""Sampling: the same image for the same (seed, number), independent of the other samples."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.data_cases import latent_shards
from support.helpers import SMALL, command, one_error_line, run

from diffratio_fast import evaluate, networks, sample, train
from diffratio_fast.data.scaling import SD_VAE
from diffratio_fast.errors import UserError
from diffratio_fast.networks.saved import SavedNetwork
from diffratio_fast.sampling import outputs


def npz(trained: Path, out: Path, *options: str) -> tuple[np.ndarray, np.ndarray]:
    assert sample.main([str(trained), "--out", str(out), *options]) == 0
    with np.load(out) as archive:
        return archive["images"], archive["labels"]


def test_images_depend_on_seed_and_number_only(trained: Path, tmp_path: Path) -> None:
    images, labels = npz(trained, tmp_path / "a.npz", "--count", "600")
    assert images.shape == (600, 8, 8, 1) and images.dtype == np.uint8
    assert labels.tolist() == [i % 10 for i in range(600)]
    few, _ = npz(trained, tmp_path / "b.npz", "--count", "7")
    assert np.array_equal(images[:7], few)
    other, _ = npz(trained, tmp_path / "c.npz", "--count", "7", "--seed", "1")
    assert not np.array_equal(few, other)


def test_any_part_of_a_sequence_is_the_same_to_the_last_bit(trained: Path) -> None:
    generator, _ = networks.load(trained / "generator.safetensors", "generator")
    labels = torch.arange(700) % 10
    whole = networks.generate(generator, labels, seed=4)
    for start, end in ((0, 1), (255, 258), (300, 700), (511, 512)):
        assert torch.equal(
            networks.generate(generator, labels[start:end], seed=4, start=start), whole[start:end]
        )


def test_grid_and_folder(trained: Path, tmp_path: Path) -> None:
    assert sample.main([str(trained), "--count", "25", "--out", str(tmp_path / "g.png")]) == 0
    picture = Image.open(tmp_path / "g.png")
    assert picture.size[0] > picture.size[1]  # ten columns, three rows
    assert (
        sample.main([str(trained), "--count", "3", "--classes", "7,1-2", "--out", str(tmp_path / "d")]) == 0
    )
    names = sorted(path.name for path in (tmp_path / "d").iterdir())
    assert names == ["000000-class7.png", "000001-class1.png", "000002-class2.png", "samples.json"]
    assert np.asarray(Image.open(tmp_path / "d" / names[0])).shape == (8, 8)


class Killed(Exception):
    pass


def killed_after(calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``networks.generate`` works ``calls`` times, then raises as if the process were killed."""
    made, generate = 0, networks.generate

    def generate_or_die(*arguments: object) -> torch.Tensor:
        nonlocal made
        made += 1
        if made > calls:
            raise Killed
        return generate(*arguments)

    monkeypatch.setattr(networks, "generate", generate_or_die)


@pytest.mark.parametrize("name", ["a.npz", "a.png", "a"])
def test_an_interrupted_run_continues_and_ends_the_same(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(outputs, "CHUNK", 256)
    whole, interrupted = tmp_path / "whole" / name, tmp_path / "interrupted" / name
    options = [str(trained), "--count", "600", "--device", "cpu", "--out"]
    assert sample.main([*options, str(whole)]) == 0
    with monkeypatch.context() as patch:
        killed_after(2, patch)
        with pytest.raises(Killed):
            sample.main([*options, str(interrupted)])
    assert interrupted.is_dir() or not interrupted.exists()
    with pytest.raises(UserError, match="in progress with another generator or other options"):
        sample.main([*options, str(interrupted), "--seed", "5"])
    with monkeypatch.context() as patch:
        killed_after(1, patch)  # one chunk remains
        assert sample.main([*options, str(interrupted)]) == 0
    assert contents(interrupted.parent) == contents(whole.parent)


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_processes_share_the_work(trained: Path, tmp_path: Path, name: str) -> None:
    """As with torchrun: RANK and WORLD_SIZE identify the processes."""
    arguments = ("sample", trained, "--count", 1100, "--device", "cpu", "--out")
    assert sample.main([str(a) for a in (*arguments[1:], tmp_path / "alone" / name)]) == 0
    processes = [
        subprocess.Popen(
            command(*arguments, tmp_path / "together" / name),
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    printed = [process.communicate(timeout=300) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], printed
    assert any("1100 images" in out for out, _ in printed)
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


def test_a_folder_grows_and_takes_no_others(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "d"
    options = [str(trained), "--device", "cpu", "--out", str(out), "--count"]
    assert sample.main([*options, "30"]) == 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.png")}
    assert sample.main([*options, "300"]) == 0
    assert (
        len(list(out.glob("*.png"))) == 300 and json.loads((out / "samples.json").read_text())["count"] == 300
    )
    assert sample.main([*options, "300"]) == 0  # nothing remains to do
    assert set(before) <= set(out.glob("*.png"))
    with pytest.raises(UserError, match="already contains 300 of these samples"):
        sample.main([*options, "30"])
    with pytest.raises(UserError, match="another generator or other options"):
        sample.main([*options, "300", "--classes", "1"])


def test_a_finished_npz_is_not_made_again(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = [str(trained), "--count", "9", "--device", "cpu", "--out", str(tmp_path / "a.npz")]
    assert sample.main(options) == 0
    killed_after(0, monkeypatch)
    assert sample.main(options) == 0
    with pytest.raises(Killed):
        sample.main([*options, "--seed", "1"])
    (tmp_path / "a.npz").write_bytes((tmp_path / "a.npz").read_bytes()[:500])
    with pytest.raises(Killed):
        sample.main(options)


@pytest.fixture
def latent_generator(trained: Path, tmp_path: Path) -> Path:
    """A generator of latents [4, 4, 4] with small random weights."""
    arguments = {"shape": (4, 4, 4), "classes": 3, "latent_size": 8, "width": 16, "depth": 2}
    generator = networks.build("generator", "mlp", arguments)
    networks.initialize(generator, 0, 0)
    scaling = {"mean": [1.0, 0.0, 2.0, -1.0], "std": [4.0, 4.0, 3.0, 3.0], "low": None, "high": None}
    data = {"name": "latents", "class_names": ["a", "b", "c"], "scaling": scaling}
    path = tmp_path / "latents.safetensors"
    networks.save(path, generator, SavedNetwork("generator", "mlp", arguments, data, {}))
    return path


def test_latents_are_decoded(latent_generator: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
    )
    vae.save_pretrained(tmp_path / "vae")
    images, _ = npz(latent_generator, tmp_path / "a.npz", "--count", "19", "--vae", str(tmp_path / "vae"))
    assert images.shape == (19, 8, 8, 3)
    generator, about = networks.load(latent_generator, "generator")
    x0 = networks.generate(generator, torch.arange(19) % 3, 0)
    z = x0 * torch.tensor([8.0, 8.0, 6.0, 6.0])[:, None, None] + torch.tensor([1.0, 0, 2, -1])[:, None, None]
    with torch.no_grad():
        expected = vae.decode(z).sample.clamp(0, 1) * 255
    assert np.abs(images - expected.permute(0, 2, 3, 1).numpy()).max() < 0.502
    few, _ = npz(latent_generator, tmp_path / "b.npz", "--count", "5", "--vae", str(tmp_path / "vae"))
    assert np.array_equal(images[:5], few)
    trained_on = about.data | {"vae": {"name": "another", "sha256": "0" * 64}}
    networks.save(latent_generator, generator, dataclasses.replace(about, data=trained_on))
    with pytest.raises(UserError, match=r"not the VAE of the training data of .* expected another"):
        npz(latent_generator, tmp_path / "c.npz", "--vae", str(tmp_path / "vae"))


def test_latents_need_their_vae(tmp_path: Path) -> None:
    """A run on latents records its decoder; its data cannot be the reference for images."""
    run, data = tmp_path / "run", latent_shards(tmp_path)
    options = ["--data", str(data), "--steps", "1", "--run-dir", str(run)]
    assert train.main([*SMALL, *options]) == 0
    _, about = networks.load(run / "generator.safetensors", "generator")
    assert about.data["vae"]["name"] == SD_VAE
    with pytest.raises(UserError, match="with --vae DIR"):
        sample.main([str(run), "--out", str(tmp_path / "a.npz")])
    np.savez(tmp_path / "b.npz", images=np.zeros((9, 32, 32, 3), np.uint8))
    with pytest.raises(UserError, match="contains latents; use the data set of the images"):
        evaluate.main([str(tmp_path / "b.npz"), "--reference", str(data)])


def test_classes() -> None:
    names = ["cat", "dog", "eel", "fox"]
    assert sample.parse_classes("all", names) == [0, 1, 2, 3]
    assert sample.parse_classes("dog,0,2-3", names) == [1, 0, 2, 3]
    for text in ("hen", "4", "3-9", "2-1", "", "1,,2"):
        with pytest.raises(UserError):
            sample.parse_classes(text, names)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["nowhere"], "no such file"),
        (["RUN", "--count", "0"], "--count"),
        (["RUN", "--classes", "12"], "class 12 is out of range"),
        (["RUN", "--out", "a.gif"], "--out a.gif"),
        (["RUN", "--seed", "-1"], "--seed"),
        (["RUN/ratio.safetensors"], "contains a ratio network"),
        (["RUN/config.yaml"], "not a safetensors file"),
        (["RUN/samples"], "no generator.safetensors"),
        (["RUN", "--columns", "0"], "--columns"),
        (["RUN", "--vae", "RUN"], "omit it"),
        (["RUN", "--out", "RUN/run"], "contains other files"),
    ],
)
def test_bad_input_gets_one_line(trained: Path, tmp_path: Path, options: list[str], expected: str) -> None:
    options = [option.replace("RUN/run", str(trained)).replace("RUN", str(trained)) for option in options]
    assert expected in one_error_line(run("sample", *options, cwd=tmp_path))
    assert list(tmp_path.iterdir()) == []
