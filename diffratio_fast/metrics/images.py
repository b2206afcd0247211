"""Images to measure, as uint8 batches in a fixed order: from folders, archives, npz files and data sets."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.pictures import records_to_uint8
from diffratio_fast.data.sources import ImageOptions, Source, Unreadable, open_source
from diffratio_fast.data.sources.files import UNLABELED
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import (
    DAMAGE,
    UNPACKED_LIMIT,
    array_header,
    one_line,
    open_regular,
    parse_json,
    read_npz,
    read_text,
)

BATCH = 256
LABELED = re.compile(r"-class(\d+)\.\w+$")
"""The class in the file names of ``sample``."""


class Images(Protocol):
    """``count`` images uint8 of ``shape`` (C, H, W), and labels int64 [count], or None if unknown."""

    @property
    def count(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def labels(self) -> np.ndarray | None: ...

    @property
    def about(self) -> dict[str, Any]:
        """The origin of the images, as JSON data."""
        ...

    def batches(self) -> Iterator[Tensor]:
        """Yield uint8 [b, C, H, W] on the CPU, from the first image to the last."""
        ...


def open_images(path: Path, channels: int, limit: int = UNPACKED_LIMIT) -> Images:
    """Open the images of an npz, or of a folder or archive of image files; otherwise raise ``UserError``.

    Files are read as RGB, or as gray if ``channels`` is 1. What is held in memory takes at most
    ``limit`` bytes.
    """
    if path.suffix == ".npz" and path.is_file():
        return NpzImages(path, limit)
    if (path / ".partial").is_dir():
        raise UserError(f"{path}: sampling is not complete; run the same `sample` command again")
    if path.is_file() and path.suffix not in (".zip", ".tar"):
        raise UserError(f"{path}: not images; expected a folder, or an .npz, .zip or .tar of images")
    source = open_source(path, "auto", ImageOptions(channels=channels, max_bytes=limit))
    if source.kind != "image":
        raise UserError(f"{path}: contains latents; expected images; decode them first")
    return FileImages(path, source)


@dataclass
class FileImages:
    """Images in files: a folder (written by ``sample``, or with a sub-folder per class) or an archive.

    ``labels`` are indices of ``class_names``; if that is None, they are the classes in the file names.
    """

    path: Path
    source: Source

    def __post_init__(self) -> None:
        self.count, self.shape = len(self.source), self.source.shape
        self.labels: np.ndarray | None = self.source.labels
        self.class_names: tuple[str, ...] | None = self.source.class_names
        if self.class_names == UNLABELED:
            found = [LABELED.search(self.source.key(i)) for i in range(self.count)]
            self.labels = np.array([int(m[1]) for m in found if m]) if all(found) else None
            self.class_names = None

    @property
    def about(self) -> dict[str, Any]:
        about = {"kind": "images", "path": str(self.path)}
        written = self.path / "samples.json"
        if written.is_file():
            about |= {"made_by": _json_or_none(read_text(written))}
        return about

    def batches(self) -> Iterator[Tensor]:
        with ThreadPoolExecutor(4) as pool:
            for start in range(0, self.count, BATCH):
                numbers = range(start, min(start + BATCH, self.count))
                try:
                    yield torch.from_numpy(np.stack(list(pool.map(self.source.read, numbers))))
                except Unreadable as error:
                    raise UserError(f"{self.path}: {error}") from None


class NpzImages:
    """Images uint8 [N, H, W, C] of an npz: ``images`` with ``labels``, or ``arr_0`` with ``arr_1``.

    They are read when needed, not kept in memory.
    """

    def __init__(self, path: Path, limit: int = UNPACKED_LIMIT) -> None:
        self.path, self._limit = path, limit
        self._about: dict[str, Any] | None = None
        try:
            with open_regular(path) as file, zipfile.ZipFile(file) as archive:
                names = {name.removesuffix(".npy") for name in archive.namelist()}
            name = next((n for n in ("images", "arr_0") if n in names), None)
            if name is None:
                hint = "; it contains statistics: use it as --reference" if {"mu", "sigma"} <= names else ""
                raise UserError(f"{path}: no array `images` or `arr_0`{hint}")
            self._name = f"{name}.npy"
            shape, dtype = self._header()
            self.labels = self._labels(shape[0] if shape else 0, "labels" if name == "images" else "arr_1")
            if "about" in names:
                self._about = _json_or_none(str(read_npz(path, {"about"}, limit=limit)["about"]))
        except DAMAGE as error:
            raise UserError(f"{path}: damaged, or not an npz of images ({one_line(error)})") from None
        if len(shape) != 4 or 0 in shape:
            raise UserError(f"{path}: images have shape {list(shape)}; expected [N, H, W, C]")
        if dtype != np.uint8:
            self._refuse_floats(dtype)
        self.count, self.shape = shape[0], (shape[3], shape[1], shape[2])

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "npz", "path": str(self.path), "made_by": self._about}

    def _header(self) -> tuple[tuple[int, ...], np.dtype]:
        with zipfile.ZipFile(self.path) as archive, archive.open(self._name) as member:
            return _array_header(member)

    def _labels(self, count: int, name: str) -> np.ndarray | None:
        labels = read_npz(self.path, {name}, limit=self._limit).get(name)
        if labels is None or not np.issubdtype(labels.dtype, np.integer):
            return None
        if labels.shape != (count,):
            raise ValueError(f"{name} has shape {list(labels.shape)}; expected [{count}]")
        return labels.astype(np.int64)

    def _refuse_floats(self, dtype: np.dtype) -> None:
        what = f"{self.path}: images are {dtype}; expected uint8; round them to 0..255"
        if np.issubdtype(dtype, np.floating):
            name = self._name.removesuffix(".npy")
            try:
                images = read_npz(self.path, {name}, limit=self._limit)[name]
            except DAMAGE:
                raise UserError(what) from None
            bad = np.flatnonzero(~np.isfinite(images.reshape(len(images), -1)).all(1))
            if len(bad):
                what = f"{self.path}: image {bad[0]} and {len(bad) - 1} others are not finite; expected uint8"
        raise UserError(what)

    def batches(self) -> Iterator[Tensor]:
        size = int(np.prod(self.shape))
        with zipfile.ZipFile(self.path) as archive, archive.open(self._name) as member:
            _array_header(member)
            for start in range(0, self.count, BATCH):
                n = min(BATCH, self.count - start)
                try:
                    content = member.read(n * size)
                except DAMAGE as error:
                    raise UserError(f"{self.path}: damaged ({one_line(error)})") from None
                if len(content) != n * size:
                    raise UserError(f"{self.path}: truncated at image {start + len(content) // size}")
                block = np.frombuffer(content, np.uint8).reshape(n, *self.shape[1:], self.shape[0])
                yield torch.from_numpy(block.transpose(0, 3, 1, 2).copy())


def _array_header(member: Any) -> tuple[tuple[int, ...], np.dtype]:
    shape, dtype, fortran = array_header(member)
    if fortran:
        raise ValueError("arrays in Fortran order are not read")
    return shape, dtype


@dataclass
class DataSetImages:
    """A split of a data set of images; ``limit`` selects the first images in stored order."""

    data: DataSet
    split: str
    limit: int | None = None
    shape: tuple[int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = self.data.shape
        self.count = min(self.data.count(self.split), self.limit or self.data.count(self.split))
        self._labels: list[Tensor] = []

    @property
    def about(self) -> dict[str, Any]:
        return {"kind": "data set", "name": self.data.name, "split": self.split}

    @property
    def labels(self) -> np.ndarray:
        """Labels int64 [count]; available after a complete pass over ``batches``."""
        return torch.cat(self._labels).numpy()

    def batches(self) -> Iterator[Tensor]:
        self._labels = []
        for start in range(0, self.count, BATCH):
            records, labels = self.data.part(self.split, start, min(start + BATCH, self.count))
            self._labels.append(labels)
            yield records_to_uint8(records, self.data.scaling)


def _json_or_none(text: str) -> Any:
    try:
        return parse_json(text)
    except ValueError:
        return None
