"""Sources of records. ``FORMATS`` lists every kind of source; a new kind is one new row."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from diffratio_fast.data.sources.arrays import CIFAR10_MD5, IDX_FILE, cifar10, idx
from diffratio_fast.data.sources.base import (
    CROPS,
    PIXELS_LIMIT,
    ImageOptions,
    Joined,
    Source,
    Unreadable,
    cut_splits,
    whole_train,
)
from diffratio_fast.data.sources.files import EdmZip, FileSource, ImageFolder, WebDataset
from diffratio_fast.errors import UserError

__all__ = [
    "CROPS", "FORMATS", "PIXELS_LIMIT", "FileSource", "ImageOptions", "Joined", "Source", "Unreadable",
    "cut_splits", "open_source", "whole_train",
]  # fmt: skip

FORMATS: dict[str, Callable[[Path, ImageOptions], Source]] = {
    "cifar10": lambda path, options: _as_stored(cifar10, path, options),
    "idx": lambda path, options: _as_stored(idx, path, options),
    "zip": EdmZip,
    "webdataset": WebDataset,
    "folder": ImageFolder,
}


def open_source(path: Path, kind: str, options: ImageOptions) -> Source:
    """Open the source at ``path``; ``kind`` is a key of ``FORMATS``, or ``auto`` to detect the kind."""
    if not path.exists():
        raise UserError(f"{path}: no such file or directory")
    if not (path.is_file() or path.is_dir()):
        raise UserError(f"{path}: neither a regular file nor a directory")
    chosen = detect(path) if kind == "auto" else kind
    source = FORMATS[chosen](path, options)
    if kind == "auto" and isinstance(source, ImageFolder):
        source.require_mostly_images()
    source.format = chosen
    return source


def detect(path: Path) -> str:
    """Detect the kind of the source at ``path`` from file names only."""
    if path.is_file():
        if path.suffix == ".zip":
            return "zip"
        if path.name.endswith((".tgz", ".tar.gz")):
            return "cifar10"
        if path.suffix == ".tar":
            return "webdataset"
        raise UserError(f"{path}: unknown kind of source; set --format to one of {', '.join(FORMATS)}")
    names = [p.name for p in path.iterdir()]
    inner = [p.name for d in path.iterdir() if d.is_dir() for p in d.iterdir()] if len(names) <= 4 else []
    first = next(iter(CIFAR10_MD5))
    if any(f"{first}{suffix}" in (*names, *inner) for suffix in ("", ".bin", ".png")):
        return "cifar10"
    if any(IDX_FILE.search(name) for name in names):
        return "idx"
    if any(name.endswith(".tar") for name in names):
        return "webdataset"
    return "folder"


def _as_stored(read: Callable[[Path, int], Source], path: Path, options: ImageOptions) -> Source:
    if options.resolution is not None or options.channels != ImageOptions.channels:
        raise UserError("--resolution and --channels do not apply to a source of fixed size; omit them")
    return read(path, options.max_bytes)
