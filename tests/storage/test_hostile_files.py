"""Hostile versions of every kind of file that the package loads: no code runs, and the error is one line.

A payload of each kind would create the file ``marker``. docs/security.md has a table of these cases.
"""

import gzip
import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from support.data_cases import image_folder, npy, picture, png, prepared
from support.helpers import SMALL, one_error_line, run

from diffratio_fast import convert, evaluate, prepare, refit, report, sample, train
from diffratio_fast.errors import UserError
from diffratio_fast.report.__main__ import main as report_main
from diffratio_fast.runs.log import MetricsLog

Case = Callable[[Path, Path], list[object]]
DEEP = "[" * 100_000


class Payload:
    """Python's pickle module creates the file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "marker"


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_the_payload_would_run(marker: Path) -> None:
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


def refused(main: Callable[[list[str]], int | None], arguments: list[object], marker: Path) -> str:
    """The one-line error of the command; no payload has run."""
    with pytest.raises(UserError) as caught:
        main([str(argument) for argument in arguments])
    message = str(caught.value)
    assert "\n" not in message and len(message) < 2000, message
    assert not marker.exists()
    return message


# ----------------------------------------------------------------------------------------- weights


def header(content: dict[str, Any], length: int | None = None) -> bytes:
    """A safetensors file with only a header, of the stated ``length``."""
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text


def network(about: object, tensors: dict[str, torch.Tensor] | None = None, **metadata: str) -> bytes:
    text = about if isinstance(about, str) else json.dumps(about)
    found = {"format": "diffratio_fast.network.1", "about": text} | metadata
    return safetensors.torch.save(tensors or {"w": torch.zeros(2)}, found)


def description(**changes: object) -> dict[str, object]:
    arguments = {"shape": [1, 8, 8], "classes": 10, "latent_size": 8, "width": 16, "depth": 2}
    scaling = {"mean": [4.0], "std": [6.0], "low": 0.0, "high": 16.0}
    about = {
        "role": "generator", "architecture": "mlp", "arguments": arguments, "training": {},
        "data": {"name": "digits", "class_names": list("0123456789"), "scaling": scaling, "vae": None},
    }  # fmt: skip
    return about | changes


HOSTILE_WEIGHTS: dict[str, Callable[[Path], bytes]] = {
    "a pickle": lambda marker: pickle.dumps(Payload(marker)),
    "a torch file": lambda marker: torch_file(Payload(marker)),
    "an absurd header": lambda _: header({}, 1 << 60),
    "a header beyond the file": lambda _: header({}, 10_000),
    "a header that is no JSON": lambda _: struct.pack("<Q", 8) + b"[[[[[[[[",
    "a deep header": lambda _: struct.pack("<Q", len(DEEP)) + DEEP.encode(),
    "offsets beyond the file": lambda _: header(
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}}
    ),
    "offsets that overlap": lambda _: (
        header(
            {
                n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "ab"
            }
        )
        + bytes(4)
    ),
    "a deep description": lambda _: network(DEEP),
    "a description that is a list": lambda _: network([1]),
    "another type of arguments": lambda _: network(description(arguments=[1])),
    "an architecture of another type": lambda _: network(description(architecture=["mlp"])),
    "a network of no end": lambda _: network(description(arguments={"width": 10**12, "depth": 10**9})),
    "arguments of other types": lambda _: network(
        description(arguments={"shape": "abc", "classes": [], "latent_size": {}, "width": "9", "depth": None})
    ),
}  # fmt: skip


def torch_file(content: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream)
    return stream.getvalue()


@pytest.mark.parametrize("case", HOSTILE_WEIGHTS)
def test_generators_and_ratio_networks(case: str, copied: Path, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    path.write_bytes(HOSTILE_WEIGHTS[case](marker))
    grid = tmp_path / "grid.png"
    fresh = [*SMALL, "--steps", 1, "--run-dir", tmp_path / "new"]
    assert "hostile" in refused(sample.main, [path, "--out", grid], marker)
    assert "hostile" in refused(
        sample.main, [copied, "--out", grid, "--candidates", 2, "--verifier", path, "--sigma", 1], marker
    )
    assert "hostile" in refused(evaluate.main, [path, "--reference", "digits"], marker)
    assert "hostile" in refused(train.main, [*fresh, "--init", path], marker)
    shutil.copyfile(path, copied / "ratio.safetensors")
    assert "ratio.safetensors" in refused(refit.main, [copied], marker)
    assert not grid.exists() and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "data",
    [{}, {"scaling": 1, "class_names": []}, {"class_names": ["0"], "scaling": {"mean": "x", "std": [0]}}],
    ids=["nothing", "numbers", "text"],
)
def test_a_generator_of_data_that_are_none(
    data: dict[str, Any], trained: Path, tmp_path: Path, marker: Path
) -> None:
    path = trained / "generator.safetensors"
    state = safetensors.torch.load_file(path)
    with safetensors.safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["about"])
    (tmp_path / "g.safetensors").write_bytes(network(about | {"data": data}, state))
    printed = refused(sample.main, [tmp_path / "g.safetensors", "--out", tmp_path / "grid.png"], marker)
    assert "metadata of the data set" in printed


@pytest.mark.parametrize(
    "config",
    ["{", DEEP, "[]", '{"img_resolution": 1000000000, "img_channels": 1000000000}',
     '{"img_resolution": 8, "img_channels": 1, "channel_mult": [[]]}'],
    ids=["cut", "deep", "list", "absurd", "types"],
)  # fmt: skip
def test_denoisers(config: str, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "denoiser.safetensors"
    path.write_bytes(
        safetensors.torch.save({"w": torch.zeros(1)}, {"architecture": "edm:ddpmpp", "config": config})
    )
    new = ["--generator", "backbone", "--steps", 1, "--run-dir", tmp_path / "new"]
    assert "denoiser.safetensors" in refused(train.main, [*SMALL, *new, "--init", path], marker)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_weights_of_feature_networks(name: str, tmp_path: Path, marker: Path) -> None:
    hostile = {"w.pth": torch_file(Payload(marker)), "w.safetensors": header({}, 1 << 60)}
    (tmp_path / name).write_bytes(hostile[name])
    image_folder(tmp_path / "images", 2, 2)
    for features in ("inception", "efficientnet-lite0"):
        arguments = ["--reference", "digits", "--features", features, "--weights", tmp_path / name]
        printed = refused(evaluate.main, [tmp_path / "images", *arguments, "--metrics", "kernel"], marker)
        assert name in printed or "digits" in printed


def test_a_classifier_with_a_pickle_in_it(tmp_path: Path, marker: Path) -> None:
    class Seven(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().mean((1, 2, 3))[:, None] * torch.ones(10)

    path = tmp_path / "seven.pt2"
    torch.export.save(torch.export.export(Seven(), (torch.zeros(4, 1, 8, 8, dtype=torch.uint8),)), path)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            hostile = name.endswith(".pt") or "sample_inputs" in name
            archive.writestr(name, torch_file(Payload(marker)) if hostile else content)
    np.savez(tmp_path / "few.npz", images=np.zeros((80, 8, 8, 1), np.uint8), labels=np.arange(80) % 10)
    arguments = ["--reference", "digits", "--metrics", "kernel", "--classifier", path]
    assert "--trust-classifier" in refused(evaluate.main, [tmp_path / "few.npz", *arguments], marker)
    arguments.append("--trust-classifier")
    assert "seven.pt2" in refused(evaluate.main, [tmp_path / "few.npz", *arguments], marker)


# ------------------------------------------------------------------------------- pickles as published


def test_published_pickles(tmp_path: Path, marker: Path) -> None:
    for name, content in {"ema": {"ema": Payload(marker)}, "fid": {"fid": Payload(marker)}}.items():
        (tmp_path / f"{name}.pkl").write_bytes(pickle.dumps(content))
    printed = refused(convert.main, [tmp_path / "ema.pkl", tmp_path / "out.safetensors"], marker)
    assert "refused" in printed and "system" in printed and not (tmp_path / "out.safetensors").exists()
    np.savez(tmp_path / "few.npz", images=np.zeros((80, 8, 8, 1), np.uint8))
    printed = refused(evaluate.main, [tmp_path / "few.npz", "--reference", tmp_path / "fid.pkl"], marker)
    assert "fid.pkl" in printed


# --------------------------------------------------------------------------------- options and records


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{','.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)
HOSTILE_YAML = {
    "a call": "steps: !!python/object/apply:os.system ['touch {marker}']",
    "a new object": "steps: !!python/object/new:os.system ['touch {marker}']",
    "a name": "!!python/name:os.system ''",
    "references to references": BOMB + "seed: *i\n",
    "merges of merges": "a: &a {{k: v}}\nb: &b {{<<: [*a, *a]}}\nsteps: 1\n",
    "depth": DEEP,
    "a date that is none": "steps: 2001-99-99",
    "a number without end": "generator_lr: " + "9" * 5000,
    "a large integer": "ratio_lr: 1" + "0" * 400,
    "binary": "\x00\x01",
    "another type": "seed: {{a: [1, 2, {{b: c}}]}}",
    "a set": "? !!set {{a}}\n: 1",
    "too long": "# " + "x" * (1 << 21),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", HOSTILE_YAML)
def test_configurations(case: str, copied: Path, tmp_path: Path, marker: Path) -> None:
    path = tmp_path / "options.yaml"
    path.write_text(HOSTILE_YAML[case].replace("{marker}", str(marker)).replace("{{", "{").replace("}}", "}"))
    refused(train.main, ["--config", path, "--run-dir", tmp_path / "new", "--steps", 1], marker)
    assert not (tmp_path / "new").exists()
    shutil.copyfile(path, copied / "config.yaml")
    refused(train.main, [*SMALL, "--steps", 4, "--run-dir", copied], marker)
    refused(refit.main, [copied], marker)
    assert report_main([str(copied)]) == 0  # shows the other files
    assert not marker.exists()


def test_options_that_are_json(tmp_path: Path, marker: Path) -> None:
    for text in (DEEP, "{", "[]"):
        options = ["--ratio-network", "encoder", "--backbone-options", text, "--run-dir", tmp_path / "new"]
        assert "--backbone-options" in refused(train.main, options, marker)


@pytest.mark.parametrize("case", ["pickle", "flipped", "header", "deep"])
def test_checkpoints(case: str, copied: Path, marker: Path) -> None:
    (copied / "summary.json").unlink()
    for path in [p for p in (copied / "checkpoint").rglob("*") if p.is_file()]:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        hostile = {
            "pickle": pickle.dumps(Payload(marker)),
            "flipped": bytes(content),
            "header": header({}, 1 << 60),
            "deep": safetensors.torch.save(
                {"w": torch.zeros(1)}, {"format": "diffratio_fast.checkpoint.1", "about": DEEP}
            ),
        }
        path.write_bytes(hostile[case])
    assert "checkpoint" in refused(train.main, [*SMALL, "--steps", 4, "--run-dir", copied], marker)


@pytest.mark.parametrize(
    "line",
    [DEEP, '{"step": 1' + "0" * 400 + "}", '{"step": [1]}', '{"step": "<script>"}', "\x00", "9" * 5000,
     '{"step": 2, "sigma": 1, "divergence_by_sigma": "<script>alert(1)</script>"}',
     '{"step": 2, "images_per_second": {"a": 1}, "seconds": "<script>alert(1)</script>"}'],
    ids=["deep", "large", "list", "text", "binary", "digits", "evaluation", "figures"],
)  # fmt: skip
def test_logs_and_reports(line: str, copied: Path, marker: Path) -> None:
    """An invalid line is skipped; metrics of other types are rejected, and never become markup."""
    with (copied / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    (copied / "report.html").unlink()
    try:
        report_main([str(copied)])
    except UserError as error:
        assert "metrics" in str(error) and "\n" not in str(error)
    if (copied / "report.html").exists():
        assert "<script>alert" not in (copied / "report.html").read_text()
    log = MetricsLog(copied / "metrics.jsonl", 3)
    log.close()
    assert all(isinstance(kept["step"], (int, float)) for kept in log.lines)
    assert not marker.exists()


@pytest.mark.parametrize("content", [DEEP, "[1]", '{"preset": "<script>alert(1)</script>"}'])
@pytest.mark.parametrize("name", ["summary.json", "measurements.json", "config.yaml"])
def test_a_report_of_hostile_files(name: str, content: str, copied: Path) -> None:
    (copied / name).write_text(content)
    report.write(copied)
    assert "<script>alert" not in (copied / "report.html").read_text()


# ----------------------------------------------------------------------------- statistics and images


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"{name}.npy", content)
    return path


def npy_header(shape: str, descr: str = "'|u1'", data: bytes = b"") -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"
    text += " " * (118 - len(text)) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode() + data


def objects(marker: Path) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([Payload(marker)]), allow_pickle=True)
    return stream.getvalue()


HOSTILE_ARRAYS: dict[str, Callable[[Path], bytes]] = {
    "objects": objects,
    "a pickle": lambda marker: pickle.dumps(Payload(marker)),
    "an absurd shape": lambda _: npy_header("(1099511627776, 1024, 1024, 3)"),
    "a shape beyond 64 bits": lambda _: npy_header(f"({10**30}, 1, 1, 1)"),
    "a negative shape": lambda _: npy_header("(-1, 8, 8, 1)", data=bytes(64)),
    "a shape that is a call": lambda marker: npy_header(f"__import__('os').system('touch {marker}')"[:80]),
    "a type that is none": lambda _: npy_header("(1,)", "'zzz'"),
    "a header of no end": lambda _: b"\x93NUMPY\x02\x00" + struct.pack("<I", 1 << 31) + b"{",
    "a nested header": lambda _: npy_header("(" * 90),
}


@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_arrays(case: str, tmp_path: Path, marker: Path) -> None:
    hostile = HOSTILE_ARRAYS[case](marker)
    good = npy(np.zeros((80, 8, 8, 1), np.uint8))
    subject = npz(tmp_path / "good.npz", images=good)
    digits = ["--reference", "digits", "--metrics", "kernel"]
    for bad in ({"images": hostile}, {"images": good, "labels": hostile}, {"images": good, "about": hostile}):
        path = npz(tmp_path / "bad.npz", **bad)
        assert "bad.npz" in refused(evaluate.main, [path, *digits], marker)
    for bad in ({"mu": hostile, "sigma": good}, {"mu": good, "sigma": hostile}, {"features": hostile}):
        path = npz(tmp_path / "statistics.npz", **bad)
        printed = refused(evaluate.main, [subject, "--reference", path, "--features", "pixels"], marker)
        assert "statistics.npz" in printed


def test_an_archive_that_swells(tmp_path: Path, marker: Path) -> None:
    """A header that claims what the archive does not hold, and an archive larger than any statistics."""
    path = npz(tmp_path / "bomb.npz", mu=npy_header("(64,)", "'<f8'", bytes(1 << 26)), sigma=bytes(1 << 26))
    assert path.stat().st_size < 1 << 18
    subject = npz(tmp_path / "good.npz", images=npy(np.zeros((80, 8, 8, 1), np.uint8)))
    printed = refused(evaluate.main, [subject, "--reference", path, "--features", "pixels"], marker)
    assert "bomb.npz" in printed and "size" in printed


@pytest.mark.parametrize("name", ["labels.npy", "checksums.npy"])
@pytest.mark.parametrize("case", HOSTILE_ARRAYS)
def test_indices_of_prepared_data(case: str, name: str, shards: Path, tmp_path: Path, marker: Path) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    (data / name).write_bytes(HOSTILE_ARRAYS[case](marker))
    new = ["--data", data, "--run-dir", tmp_path / "new", "--steps", 1]
    assert name in refused(train.main, [*SMALL, *new], marker)


# ------------------------------------------------------------------------------------- prepared data


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("prepared"))


MANIFEST: dict[str, Callable[[dict[str, Any]], object]] = {
    "a path that leaves": lambda m: m["shards"][0].update(file="../../etc/passwd"),
    "an absolute path": lambda m: m["shards"][0].update(file="/etc/passwd"),
    "a record of no end": lambda m: m.update(shape=[3, 10**9, 10**9], record_bytes=3 * 10**18),
    "as many records": lambda m: m["shards"][0].update(records=10**18, size=192 * 10**18),
    "numbers as text": lambda m: m.update(records="60"),
    "a scaling of text": lambda m: m["scaling"].update(mean="abc"),
    "bounds of text": lambda m: m["scaling"].update(low="a"),
    "no numbers": lambda m: m["scaling"].update(std=[float("nan")] * 3),
    "a list of shards that is none": lambda m: m.update(shards=7),
}


@pytest.mark.parametrize("case", [*MANIFEST, "deep", "pickle"])
def test_manifests(case: str, shards: Path, tmp_path: Path, marker: Path) -> None:
    data = Path(shutil.copytree(shards, tmp_path / "data"))
    path = data / "manifest.json"
    if case in MANIFEST:
        content = json.loads(path.read_text())
        MANIFEST[case](content)
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(DEEP.encode() if case == "deep" else pickle.dumps(Payload(marker)))
    new = ["--data", data, "--run-dir", tmp_path / "new", "--steps", 1]
    assert str(data) in refused(train.main, [*SMALL, *new], marker)
    assert str(data) in refused(prepare.main, ["--verify", data], marker)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("content", [DEEP, "[1]", '{"file": "../../../etc/passwd", "size": 1}'])
def test_notes_of_work_in_progress(content: str, tmp_path: Path, marker: Path) -> None:
    source, out = image_folder(tmp_path / "images", 2, 4), tmp_path / "out"
    (out / ".partial").mkdir(parents=True)
    for name in ("plan.json", "shard-00000.json"):
        (out / ".partial" / name).write_text(content)
        assert "out" in refused(prepare.main, [source, out], marker)
        (out / ".partial" / name).unlink()


# ----------------------------------------------------------------------------------------- raw data


POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 8 8
(%pipe%touch MARKER) (w) file closefile
showpage
"""


def swollen_png(side: int) -> bytes:
    """A PNG of a kilobyte that claims side x side pixels."""
    content = bytearray(png(picture(0)))
    content[16:24] = struct.pack(">II", side, side)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


def tar(path: Path, *members: tuple[str, bytes], kind: bytes = tarfile.REGTYPE, mode: Any = "w") -> Path:
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(content), kind, "/etc/passwd"
            archive.addfile(info, io.BytesIO(content))
    return path


def zip_of(path: Path, name: str, content: bytes, labels: str = '{"labels": null}') -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
        archive.writestr("dataset.json", labels)
    return path


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for name, content in files.items():
        (path / name.replace("_", ".", 1)).write_bytes(content)
    return path


def idx_folder(path: Path, head: bytes) -> Path:
    path.mkdir()
    for split in ("train", "t10k"):
        for what in ("images-idx3", "labels-idx1"):
            (path / f"{split}-{what}-ubyte.gz").write_bytes(gzip.compress(head))
    return path


def cifar(path: Path, **files: bytes) -> Path:
    path.mkdir()
    for number in range(1, 6):
        for name, content in files.items():
            (path / name.replace("N", str(number)).replace("__", ".")).write_bytes(content)
    return path


SOURCES: dict[str, Callable[[Path, Path], Path]] = {
    "PostScript that is called a PNG": lambda at, marker: folder_of(
        at / "d", a_png=POSTSCRIPT.replace(b"MARKER", bytes(marker))
    ),
    "an image of no end": lambda at, _: folder_of(at / "d", a_png=swollen_png(100_000)),
    "a pickle that is called a PNG": lambda at, marker: folder_of(
        at / "d", a_png=pickle.dumps(Payload(marker))
    ),
    "an array of objects": lambda at, marker: zip_of(at / "z.zip", "a.npy", objects(marker)),
    "an absurd array": lambda at, _: zip_of(at / "z.zip", "a.npy", npy_header("(8, 1048576, 1048576)")),
    "labels that are deep": lambda at, _: zip_of(at / "z.zip", "a.png", png(picture(0)), DEEP),
    "labels that are lists": lambda at, _: zip_of(
        at / "z.zip", "a.png", png(picture(0)), '{"labels": [[[]]]}'
    ),
    "a label of no end": lambda at, _: zip_of(
        at / "z.zip", "a.png", png(picture(0)), '{"labels": [["a.png", 99999999999]]}'
    ),
    "a ZIP that leaves its folder": lambda at, _: zip_of(at / "z.zip", "../../a.png", png(picture(0))),
    "a ZIP that is none": lambda at, _: at / "z.zip",
    "a tar that leaves its folder": lambda at, _: tar(at / "t.tar", ("../a.png", png(picture(0)))),
    "a tar of links": lambda at, _: tar(at / "t.tar", ("a.png", b""), kind=tarfile.SYMTYPE),
    "a tar of devices": lambda at, _: tar(at / "t.tar", ("a.png", b""), kind=tarfile.CHRTYPE),
    "a tar with deep labels": lambda at, _: tar(at / "t.tar", ("a.png", b"x"), ("a.json", DEEP.encode())),
    "a tar with a label of many digits": lambda at, _: tar(
        at / "t.tar", ("a.png", b"x"), ("a.cls", b"9" * 9999)
    ),
    "IDX files of no end": lambda at, _: idx_folder(
        at / "i", struct.pack(">IIII", 0x803, 2**31, 2**31, 2**31) + bytes(64)
    ),
    "IDX files that swell": lambda at, _: idx_folder(
        at / "i", struct.pack(">IIII", 0x803, 1, 8, 8) + bytes(1 << 24)
    ),
    "a CIFAR batch that is a call": lambda at, marker: cifar(
        at / "c", data_batch_N=pickle.dumps({b"data": Payload(marker), b"labels": [1]})
    ),
    "CIFAR sheets with deep labels": lambda at, _: cifar(
        at / "c", data_batch_N__png=png(picture(0)), train_lables__json=DEEP.encode()
    ),
    "CIFAR sheets in PostScript": lambda at, marker: cifar(
        at / "c", data_batch_N__png=POSTSCRIPT.replace(b"MARKER", bytes(marker)), train_lables__json=b"[1]"
    ),
    "a packed CIFAR tar that leaves": lambda at, _: tar(
        at / "c.tar.gz", ("../data_batch_1", b"x"), mode="w:gz"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", SOURCES)
def test_sources_of_data(case: str, tmp_path: Path, marker: Path) -> None:
    (tmp_path / "z.zip").write_bytes(b"PK\x05\x06" + b"\xff" * 40)
    source = SOURCES[case](tmp_path, marker)
    refused(prepare.main, [source, tmp_path / "out"], marker)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert sorted(p.name for p in tmp_path.parent.iterdir() if p.suffix == ".png") == []


# ---------------------------------------------------------------------------------- samples and status


def test_samples_in_progress(trained: Path, tmp_path: Path, marker: Path) -> None:
    out = tmp_path / "samples"
    assert sample.main([str(trained), "--count", "3", "--out", str(out)]) == 0
    for content in (DEEP, "[1]", '{"count": "x"}'):
        (out / "samples.json").write_text(content)
        assert "samples.json" in refused(sample.main, [trained, "--count", 3, "--out", out], marker)
    hostile = npz(tmp_path / "s.npz", images=objects(marker), labels=objects(marker), about=objects(marker))
    assert sample.main([str(trained), "--count", "3", "--out", str(hostile)]) == 0  # generated again
    assert not marker.exists()


@pytest.mark.slow
def test_status_and_the_one_line_of_a_process(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("steps: !!python/object/apply:os.system ['touch marker']")
    (tmp_path / "bad.safetensors").write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    for arguments in (("train", "--config", "bad.yaml"), ("sample", "bad.safetensors")):
        assert "bad." in one_error_line(run(*arguments, cwd=tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors", "bad.yaml"]
