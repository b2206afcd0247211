"""Write shards: resumable at any point, with the same bytes in every run.

The order of records is fixed first. A shard is a fixed slice of that order, so shards are independent.
Each shard is written to a temporary file, flushed, renamed, and then recorded in ``partial/``. A shard
that is not recorded is written again by the next run. Several processes can write one data set: each
writes the shards that no other process has locked (a file lock ends with its process). The process that
finds all shards recorded writes the index files and, last, the manifest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from diffratio_fast.data.dataset import SPLITS
from diffratio_fast.data.manifest import (
    CHECKSUMS,
    DTYPES,
    LABELS,
    MANIFEST,
    Manifest,
    Shard,
    Statistics,
    read_manifest,
)
from diffratio_fast.data.sampler import permutation
from diffratio_fast.data.scaling import EDM_PIXELS, LATENT_SCALINGS, Scaling, Vae
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, one_line, parse_json
from diffratio_fast.storage.writing import lock, make_directory, replace_file, sync_directory

PARTIAL = "partial"
UNREADABLE = "unreadable.txt"
SHARD_BYTES = 256 << 20
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Entries:
    """Records to write: source index, mirrored or not, split and label.

    ``index`` int64 (n,), ``mirrored`` bool (n,), ``split`` uint8 (n,), ``label`` int64 (n,).
    """

    index: np.ndarray
    mirrored: np.ndarray
    split: np.ndarray
    label: np.ndarray

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, part: slice) -> Entries:
        return Entries(*(array[part] for array in vars(self).values()))


Records = Iterator[np.ndarray | str]
"""One item per entry: the record in its stored dtype, or the reason why it cannot be read."""


@dataclass(frozen=True)
class Plan:
    """Everything that determines the bytes, except the content of the source."""

    name: str
    kind: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    scaling: str
    shard_bytes: int
    seed: int
    mirrors: bool
    vae: Vae | None
    source: dict[str, Any]

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(DTYPES[self.kind]).newbyteorder("<")

    @property
    def record_bytes(self) -> int:
        return int(np.prod(self.shape)) * self.dtype.itemsize

    def identity(self) -> str:
        """A digest of the plan: two runs with the same identity write the same bytes."""
        content = {k: v if k != "vae" or v is None else [v.name, v.sha256] for k, v in vars(self).items()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def fixed_order(labels: np.ndarray, splits: np.ndarray, *, seed: int, mirrors: bool) -> Entries:
    """Entries in the order of writing: split after split, each in a fixed random order.

    With ``mirrors`` every training record is written twice: unchanged and mirrored.
    """
    indices, mirrored = [np.empty(0, np.int64)], [np.empty(0, bool)]
    for split, name in enumerate(SPLITS):
        members = np.flatnonzero(splits == split)
        copies = 2 if mirrors and name == "train" else 1
        if len(members):
            chosen = permutation(seed, split + 1, len(members) * copies)
            indices.append(members[chosen // copies])
            mirrored.append(chosen % copies == 1)
    index = np.concatenate(indices)
    return Entries(index, np.concatenate(mirrored), splits[index], labels[index])


def write_shards(
    destination: Path,
    plan: Plan,
    order: Entries,
    read: Callable[[Entries], Records],
    *,
    skip_unreadable: bool,
    part: float = 0,
    progress: Callable[[int, int], None] = lambda done, unreadable: None,
) -> Manifest | None:
    """Write the missing shards of ``order`` into ``destination``; None if another process must finish.

    ``read`` yields the records of entries in order. This process begins at the fraction ``part`` of the
    shards, in [0, 1). ``progress`` is called with the records done and the records that could not be read.
    Raises ``UserError`` if the directory has other content, or at the first unreadable record unless
    ``skip_unreadable``.
    """
    try:
        return _write_missing(destination, plan, order, read, skip_unreadable, part, progress)
    except (FileNotFoundError, UserError):
        # If another process has finished, it has removed ``partial`` while this one used it.
        if not (destination / MANIFEST).exists():
            raise
        return _finished(destination, plan.identity())


def _write_missing(
    destination: Path,
    plan: Plan,
    order: Entries,
    read: Callable[[Entries], Records],
    skip_unreadable: bool,
    part: float,
    progress: Callable[[int, int], None],
) -> Manifest | None:
    identity = plan.identity()
    partial = destination / PARTIAL
    # The order matters: another process creates ``partial`` first and removes it after the manifest.
    occupied = destination.is_dir() and any(destination.iterdir())
    begun = partial.exists()
    if (destination / MANIFEST).exists():
        manifest = _finished(destination, identity)
        progress(len(order), 0)
        return manifest
    if occupied and not begun:
        raise UserError(f"{destination}: not empty and not a data set in progress; choose another directory")
    make_directory(partial)
    with lock(partial / "plan.lock", wait=True):
        written = partial / "plan.json"
        if not written.exists():
            replace_file(written, json.dumps({"identity": identity}).encode())
        elif _progress(written)["identity"] != identity:
            if not _nothing_written(partial):
                raise UserError(
                    f"{destination}: begun with other options or another source; remove it, or rerun as "
                    "before"
                )
            replace_file(written, json.dumps({"identity": identity}).encode())
    per_shard = max(1, plan.shard_bytes // plan.record_bytes)
    slices = [order[i : i + per_shard] for i in range(0, len(order), per_shard)]
    for turn in range(len(slices)):
        number = (int(part * len(slices)) + turn) % len(slices)
        with lock(partial / f"shard-{number:05d}.lock") as mine:
            if not mine:
                continue
            if _is_complete(destination, _record_path(partial, number)):
                progress(len(slices[number]), 0)
            elif not (destination / MANIFEST).exists():  # otherwise another process has just finished
                _write_shard(destination, number, slices[number], read, plan, skip_unreadable, progress)
    with lock(partial / "finish.lock", wait=True):
        if (destination / MANIFEST).exists():
            return _finished(destination, identity)
        notes = [_record_path(partial, number) for number in range(len(slices))]
        if not all(_is_complete(destination, note) for note in notes):
            return None
        _finish(destination, plan, identity, [_progress(note) for note in notes])
        return _finished(destination, identity)


def begun(destination: Path) -> bool:
    """Whether shards were written into ``destination``, by a finished or an interrupted preparation."""
    return (destination / MANIFEST).exists() or any((destination / PARTIAL).glob("shard-*.json"))


def _nothing_written(partial: Path) -> bool:
    """Whether an earlier attempt ended before its first shard, and no process is writing one."""
    if any(partial.glob("shard-*.json")):
        return False
    for path in partial.glob("shard-*.lock"):
        with lock(path) as mine:
            if not mine:
                return False
    return True


def _finished(destination: Path, identity: str) -> Manifest:
    """Read the manifest of a complete data set and remove ``partial``."""
    manifest = read_manifest(destination)
    if manifest.source.get("identity") != identity:
        raise UserError(
            f"{destination}: contains another data set ({manifest.name}); choose another directory"
        )
    # A late process can add a lock file during the removal; the last process removes all.
    shutil.rmtree(destination / PARTIAL, ignore_errors=True)
    return manifest


def _record_path(partial: Path, number: int) -> Path:
    return partial / f"shard-{number:05d}.json"


def _progress(path: Path) -> dict[str, Any]:
    """Read a file of ``partial``: the identity of the plan, or a finished shard."""
    try:
        content = parse_json(path.read_text())
        if "identity" not in content:
            shard = Shard(content["file"], int(content["records"]), int(content["size"]), content["sha256"])
            expected = f"{path.stem}.bin", len(content["labels"]), len(content["checksums"])
            if expected != (shard.file, shard.records, shard.records):
                raise ValueError("its fields are inconsistent")
    except DAMAGE as error:
        raise UserError(
            f"{path}: damaged ({one_line(error)}); remove {path.parent.parent} and rerun"
        ) from None
    return content


def _is_complete(destination: Path, note: Path) -> bool:
    """Whether a shard is recorded and its file has the full size."""
    if not note.exists():
        return False
    content = _progress(note)
    shard = destination / content["file"]
    return shard.exists() and shard.stat().st_size == content["size"]


def _write_shard(
    destination: Path,
    number: int,
    entries: Entries,
    read: Callable[[Entries], Records],
    plan: Plan,
    skip_unreadable: bool,
    progress: Callable[[int, int], None],
) -> None:
    name = f"shard-{number:05d}.bin"
    temporary = destination / f"{name}.tmp"
    sha256, size = hashlib.sha256(), 0
    moments = Moments(plan.shape[0])
    labels: list[int] = []
    checksums: list[int] = []
    unreadable: list[str] = []
    counts = [0] * len(SPLITS)
    records = read(entries)
    chunk = max(1, CHUNK_BYTES // plan.record_bytes)
    try:
        temporary.unlink(missing_ok=True)
        with temporary.open("xb") as file:  # a link in its place is not followed
            for start in range(0, len(entries), chunk):
                kept: list[np.ndarray] = []
                training = 0  # splits follow each other, so the training records of a chunk come first
                failed = 0
                part = entries[start : start + chunk]
                for split, label in zip(part.split.tolist(), part.label.tolist(), strict=True):
                    record = next(records)
                    if isinstance(record, str):
                        if not skip_unreadable:
                            raise UserError(
                                f"unreadable: {record}; repair the record, or pass --unreadable skip"
                            )
                        unreadable.append(record)
                        failed += 1
                        continue
                    assert record.shape == plan.shape and record.dtype == plan.dtype, (
                        record.shape,
                        record.dtype,
                    )
                    kept.append(record)
                    labels.append(label)
                    checksums.append(xxhash.xxh3_64_intdigest(np.ascontiguousarray(record).data))
                    counts[split] += 1
                    training += SPLITS[split] == "train"
                if kept:
                    block = np.stack(kept)
                    moments.add(block[:training])
                    content = block.tobytes()
                    file.write(content)
                    sha256.update(content)
                    size += len(content)
                progress(len(part), failed)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, destination / name)
        sync_directory(destination)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"cannot write {temporary}: {why}; fix the cause and rerun to resume") from None
    finally:
        with contextlib.suppress(OSError):  # it would hide the error that led here
            temporary.unlink(missing_ok=True)
    content_of = {"file": name, "records": len(labels), "size": size, "sha256": sha256.hexdigest()}
    content_of |= {"counts": counts, "labels": labels, "checksums": checksums, "unreadable": unreadable}
    content_of |= {"moments": moments.to_json()}
    replace_file(_record_path(destination / PARTIAL, number), json.dumps(content_of).encode())


def _finish(destination: Path, plan: Plan, identity: str, notes: list[dict[str, Any]]) -> Manifest:
    """Write the index files and the manifest of a complete set of shards."""
    moments = Moments(plan.shape[0])
    for note in notes:
        moments.merge(Moments.from_json(note["moments"]))
    ends = np.cumsum([sum(note["counts"][s] for note in notes) for s in range(len(SPLITS))]).tolist()
    if not ends[0]:
        raise UserError("no training record could be read; expected at least one; check the source")
    unreadable = [line for note in notes for line in note["unreadable"]]
    labels = np.array([label for note in notes for label in note["labels"]], "<i8")
    checksums = np.array([checksum for note in notes for checksum in note["checksums"]], "<u8")
    sha256 = {}
    for file, array in ((LABELS, labels), (CHECKSUMS, checksums)):
        content = npy_bytes(array)
        replace_file(destination / file, content)
        sha256[file] = hashlib.sha256(content).hexdigest()
    if unreadable:
        replace_file(destination / UNREADABLE, "".join(line + "\n" for line in unreadable).encode())
    statistics = moments.statistics()
    manifest = Manifest(
        name=plan.name,
        kind=plan.kind,
        shape=plan.shape,
        class_names=plan.class_names,
        scaling=choose_scaling(plan, statistics),
        statistics=statistics,
        splits={s: (b, e) for s, b, e in zip(SPLITS, [0, *ends], ends, strict=False)},
        shards=tuple(Shard(n["file"], n["records"], n["size"], n["sha256"]) for n in notes),
        sha256=sha256,
        vae=plan.vae,
        source=plan.source
        | {"seed": plan.seed, "mirrors": plan.mirrors, "identity": identity, "unreadable": len(unreadable)},
    )
    replace_file(destination / MANIFEST, manifest.to_json().encode())
    return manifest


def choose_scaling(plan: Plan, statistics: Statistics) -> Scaling:
    """The scaling from records to x0: published for known VAEs, [-1, 1] for ``edm``, measured otherwise.

    ``auto`` is ``edm`` for color images and ``measured`` for gray images.
    """
    mean, std = np.array(statistics.mean), np.array(statistics.std)
    if plan.vae is not None:
        if plan.vae.name in LATENT_SCALINGS:
            return LATENT_SCALINGS[plan.vae.name]
        half = plan.shape[0] // 2  # z = mean + std·ε has variance Var[mean] + E[std²]
        drawn = np.sqrt(std[:half] ** 2 + std[half:] ** 2 + mean[half:] ** 2)
        return Scaling(tuple(mean[:half].tolist()), tuple(drawn.tolist()))
    if plan.scaling == "edm" or (plan.scaling == "auto" and plan.shape[0] == 3):
        return EDM_PIXELS
    # One number for all channels keeps the proportions of colors.
    overall = float(mean.mean())
    spread = float(np.sqrt(np.mean(std**2 + (mean - overall) ** 2)))
    return Scaling((overall,), (max(spread, 1e-6),), 0, 255)


class Moments:
    """Running count, sums, minimum and maximum per channel; exact for pixels."""

    def __init__(self, channels: int) -> None:
        self.count = 0
        self.sum, self.squares = np.zeros(channels), np.zeros(channels)
        self.min, self.max = np.full(channels, np.inf), np.full(channels, -np.inf)

    def add(self, records: np.ndarray) -> None:
        """Add records [n, C, H, W]."""
        if not len(records):
            return
        values = records.astype(np.float64)
        self.count += values[:, 0].size
        self.sum += values.sum((0, 2, 3))
        self.squares += np.square(values).sum((0, 2, 3))
        self.min = np.minimum(self.min, values.min((0, 2, 3)))
        self.max = np.maximum(self.max, values.max((0, 2, 3)))

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.sum, self.squares = self.sum + other.sum, self.squares + other.squares
        self.min, self.max = np.minimum(self.min, other.min), np.maximum(self.max, other.max)

    def statistics(self) -> Statistics:
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return Statistics(*(tuple(a.tolist()) for a in (mean, std, self.min, self.max)))

    def to_json(self) -> dict[str, Any]:
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in vars(self).items()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Moments:
        moments = cls(len(content["sum"]))
        moments.count = content["count"]
        for name in ("sum", "squares", "min", "max"):
            setattr(moments, name, np.array(content[name], np.float64))
        return moments


def npy_bytes(array: np.ndarray) -> bytes:
    """Encode an array as the bytes of a ``.npy`` file."""
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()
