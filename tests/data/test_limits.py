"""Decompression bombs and paths that are not files: rejected before memory is allocated."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import socket
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_cases import image_folder
from support.helpers import in_child

from diffratio_fast import evaluate, prepare
from diffratio_fast.metrics.features.base import read_weights
from diffratio_fast.storage.pickles import check_torch_file

MANY = 1 << 30
"""Bytes that each file claims; a child that allocates them fails, as its limit is lower."""


def npy_head(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz_bomb(path: Path, *names: str) -> Path:
    """An .npz of arrays of a GiB of zeros each, a thousandth of the size on disk."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name in names:
            info = zipfile.ZipInfo(f"{name}.npy")
            info.compress_type = zipfile.ZIP_DEFLATED
            with archive.open(info, "w", force_zip64=True) as member:
                member.write(npy_head((MANY // 8,), "<f8"))
                for _ in range(MANY >> 20):
                    member.write(bytes(1 << 20))
    return path


def thin_png(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    rows = zlib.compress((b"\0" + bytes(width)) * height, 9)
    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def refused(main: Callable[[list[str]], object], *arguments: object, memory: int = 600 << 20) -> str:
    return in_child(lambda: main([str(argument) for argument in arguments]), memory=memory)


@pytest.mark.slow
def test_arrays_of_statistics_and_images(tmp_path: Path) -> None:
    few = tmp_path / "few.npz"
    np.savez(few, images=np.zeros((80, 8, 8, 1), np.uint8))
    bomb = npz_bomb(tmp_path / "bomb.npz", "mu", "sigma", "features")
    assert bomb.stat().st_size < 20 << 20
    common = ["--features", "pixels", "--metrics", "kernel", "--max-bytes", 1 << 29]
    assert "--max-bytes" in refused(evaluate.main, few, "--reference", bomb, *common)
    floats = npz_bomb(tmp_path / "floats.npz", "images")
    assert "floats.npz" in refused(evaluate.main, floats, "--reference", "digits", *common)


@pytest.mark.slow
def test_weights(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stream)
    plain = zipfile.ZipFile(stream)
    path = tmp_path / "w.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for info in plain.infolist():
            archive.writestr(info.filename, plain.read(info))
        info = zipfile.ZipInfo("archive/data/1")
        info.compress_type = zipfile.ZIP_DEFLATED
        with archive.open(info, "w", force_zip64=True) as member:
            for _ in range(MANY >> 20):
                member.write(bytes(1 << 20))
    assert "compressed archive" in in_child(lambda: read_weights(path), memory=600 << 20)
    stored = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, stored)
    check_torch_file(stored)
    legacy = io.BytesIO()
    torch.save({"w": torch.zeros(2)}, legacy, _use_new_zipfile_serialization=False)
    check_torch_file(legacy)
    assert read_weights_of(stored, tmp_path) == read_weights_of(legacy, tmp_path) == [0.0, 0.0]


def read_weights_of(content: io.BytesIO, where: Path) -> list[float]:
    path = where / "plain.pth"
    path.write_bytes(content.getvalue())
    numbers: list[float] = read_weights(path)[0]["w"].tolist()
    return numbers


def test_weights_with_a_key_of_nested_tuples() -> None:
    """torch's own restricted reader would hash it for years."""
    with pytest.raises(ValueError, match="as a key"):
        check_torch_file(io.BytesIO(_legacy_with(b"})" + b"2\x86" * 60 + b"K\x01s.")))


def _legacy_with(content: bytes) -> bytes:
    """The pickles of a legacy file, the fourth of them ``content``."""
    before = [pickle.dumps(part) for part in (0x1950A86A20F9469CFC6C, 1001, {})]
    return b"".join([*before, b"\x80\x02" + content])


def test_thin_images(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.png").write_bytes(thin_png(1, 200_000))
    assert (folder / "a.png").stat().st_size < 1000
    printed = refused(prepare.main, folder, tmp_path / "out", "--resolution", 64, memory=1 << 30)
    assert "--max-pixels" in printed and "a.png" in printed
    (folder / "a.png").write_bytes(thin_png(2000, 2000))
    printed = refused(prepare.main, folder, tmp_path / "out", "--resolution", 64, "--max-pixels", 1_000_000)
    assert "an image of 2000 x 2000 pixels, more than 1000000 (--max-pixels)" in printed


@pytest.mark.slow
def test_sources_held_in_memory(tmp_path: Path) -> None:
    folder = tmp_path / "idx"
    folder.mkdir()
    side = 1 << 15
    for split in ("train", "t10k"):
        for what, head in (("images-idx3", (0x803, 1, side, side)), ("labels-idx1", (0x801, 1))):
            with gzip.open(folder / f"{split}-{what}-ubyte.gz", "wb", compresslevel=1) as file:
                file.write(struct.pack(f">{len(head)}I", *head))
                for _ in range(MANY >> 20 if "images" in what else 0):
                    file.write(bytes(1 << 20))
                file.write(b"\0")
    printed = refused(prepare.main, folder, tmp_path / "out", "--max-bytes", 1 << 29)
    assert "--max-bytes" in printed and "ubyte" in printed

    path = tmp_path / "cifar.tar.gz"  # a header of a GiB for a name
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, MANY
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        for _ in range(MANY >> 20):
            file.write(bytes(1 << 20))
    assert "--max-bytes" in refused(prepare.main, path, tmp_path / "out", "--max-bytes", 1 << 28)


@pytest.mark.parametrize("kind", ["FIFO", "socket", "device", "dangling link"])
def test_what_is_called_an_image_and_is_no_file(kind: str, tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "images", 2, 2)
    path = sorted(p for p in folder.iterdir() if p.is_dir())[0] / "x.png"
    if kind == "FIFO":
        os.mkfifo(path)
    elif kind == "socket":
        os.chdir(path.parent)  # the path of a socket must be short
        socket.socket(socket.AF_UNIX).bind("x.png")
    elif kind == "device":
        os.symlink("/dev/zero", path)
    else:
        os.symlink(tmp_path / "nothing", path)
    printed = in_child(lambda: prepare.main([str(folder), str(tmp_path / "out")]))
    assert "x.png" in printed and ("not a regular file" in printed or "No such file" in printed)


def test_a_source_that_is_a_fifo(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.tar")
    printed = in_child(lambda: prepare.main([str(tmp_path / "a.tar"), str(tmp_path / "out")]))
    assert "neither a regular file nor a directory" in printed
    folder = tmp_path / "tars"
    folder.mkdir()
    os.mkfifo(folder / "a.tar")
    assert "not a regular file" in in_child(lambda: prepare.main([str(folder), str(tmp_path / "out")]))
