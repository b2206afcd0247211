"""The records of a prepared data set: open and check shards, read rows into the caller's buffers.

Shards are read with ``preadv`` and not mapped. Warm reads run at memory speed either way, but the pages
belong to the kernel (resident memory does not grow with the data set), a cold record is one request of its
exact size, and a file that is truncated while it is open raises an error instead of killing the process.
"""

from __future__ import annotations

import os
import resource
from pathlib import Path

import numpy as np
import xxhash

from diffratio_fast.data.manifest import CHECKSUMS, LABELS, RESTORE, Manifest
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, one_line


class Records:
    """Open shards. Opening checks every file size. Reading is thread-safe and releases the GIL.

    ``labels`` is int64 (N,) and ``checksums`` uint64 (N,), both mapped read-only.
    """

    def __init__(self, directory: Path, manifest: Manifest) -> None:
        self.directory, self.manifest = directory, manifest
        self.record_bytes = manifest.record_bytes
        self._starts = np.cumsum([0] + [s.records for s in manifest.shards])
        self._files: list[int] = []
        self._paths = [directory / s.file for s in manifest.shards]
        for shard, path in zip(manifest.shards, self._paths, strict=True):
            check_size(path, shard.size)
        self.labels = load_index(directory / LABELS, np.dtype("<i8"), manifest.records)
        self.checksums = load_index(directory / CHECKSUMS, np.dtype("<u8"), manifest.records)
        check_labels(directory / LABELS, self.labels, len(manifest.class_names))
        _allow_open_files(len(self._paths))
        for path in self._paths:
            try:
                self._files.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
            except OSError as error:
                raise UserError(f"{path}: {error.strerror or error}; {RESTORE}") from None

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)

    def gather(self, rows: np.ndarray, out: np.ndarray, *, verify: bool) -> None:
        """Read records ``rows`` int64 (b,) into ``out`` uint8 (b, record_bytes), contiguous.

        Consecutive rows are one request. With ``verify`` each record's xxh3 is compared with its checksum.
        Raises ``UserError`` with file and record if a file is truncated or a record is damaged.
        """
        if not len(rows):
            return
        size = self.record_bytes
        shards = self._shard_of(rows)
        offsets = (rows - self._starts[shards]) * size
        cuts = np.flatnonzero((np.diff(rows) != 1) | (np.diff(shards) != 0)) + 1
        first = np.concatenate([[0], cuts])
        begins, ends = (first * size).tolist(), np.append(cuts * size, len(rows) * size).tolist()
        buffer = out.reshape(-1).data
        for shard, offset, begin, end in zip(
            shards[first].tolist(), offsets[first].tolist(), begins, ends, strict=True
        ):
            while begin < end:  # one iteration, except after a short read (2 GiB, a signal)
                try:
                    got = os.preadv(self._files[shard], (buffer[begin:end],), offset)
                except OSError as error:
                    raise UserError(
                        f"{self._paths[shard]}: cannot be read at record {offset // size} of this shard "
                        f"({error.strerror or error}); check the disk, or {RESTORE}"
                    ) from None
                if got == 0:
                    expected = self.manifest.shards[shard].size
                    raise UserError(_truncated(self._paths[shard], offset, expected, offset // size))
                begin, offset = begin + got, offset + got
        if verify:
            self._verify(rows, out)

    def _verify(self, rows: np.ndarray, out: np.ndarray) -> None:
        for row, expected, record in zip(rows.tolist(), self.checksums[rows].tolist(), out, strict=True):
            if xxhash.xxh3_64_intdigest(record) != expected:
                raise UserError(self.damage(row))

    def damage(self, row: int) -> str:
        """The error message for a record with a wrong checksum."""
        shard = int(self._shard_of(np.array([row]))[0])
        return (
            f"{self._paths[shard]}: record {row} (number {row - self._starts[shard]} of this shard) is "
            f"damaged: wrong xxh3; {RESTORE}"
        )

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1


def check_size(path: Path, size: int) -> None:
    """Raise ``UserError`` unless ``path`` is a file of ``size`` bytes."""
    try:
        actual = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: missing ({error.strerror}); {RESTORE}") from None
    if actual < size:
        raise UserError(_truncated(path, actual, size, None))
    if actual > size:
        raise UserError(f"{path}: {actual} bytes; the manifest expects {size}; {RESTORE}")


def _truncated(path: Path, actual: int, size: int, record: int | None) -> str:
    where = "" if record is None else f" at record {record} of this shard"
    return f"{path}: truncated{where} ({actual} of {size} bytes); {RESTORE}"


def load_index(path: Path, dtype: np.dtype, records: int) -> np.ndarray:
    """Map the index file ``path``; raises ``UserError`` unless it is ``dtype`` (records,)."""
    try:
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGE as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)}); {RESTORE}") from None
    if not isinstance(index, np.ndarray) or index.dtype != dtype or index.shape != (records,):
        raise UserError(f"{path}: wrong dtype or shape; the manifest expects {dtype} ({records},); {RESTORE}")
    return index


def check_labels(path: Path, labels: np.ndarray, classes: int) -> None:
    """Raise ``UserError`` naming the first record whose label is not in [0, classes)."""
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise UserError(
            f"{path}: record {wrong[0]} has label {labels[wrong[0]]}; expected 0 to {classes - 1} "
            f"({len(wrong)} such labels); prepare the data set again"
        )


def _allow_open_files(count: int) -> None:
    """Raise the soft limit of open files if ``count`` shards need it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = count + 256
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise UserError(
                f"{count} shards need {needed} open files, but the limit is {hard}; raise it (ulimit -n) or "
                "prepare the data set with a larger --shard-bytes"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
