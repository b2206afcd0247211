"""Outputs of samples: a grid, an npz or a folder, written in chunks by any number of processes, resumable.

A chunk is a fixed range of sample numbers. A process generates the missing chunks that no other process has
locked (a file lock ends with its process). The process that finds all chunks complete writes the output.
Chunks in progress are in a hidden directory: next to a grid or an npz, inside a folder.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from diffratio_fast.data.pictures import grid, png
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, one_line, parse_json, read_npz
from diffratio_fast.storage.writing import lock, make_directory, replace_file, replacing

CHUNK = 256
"""Images per chunk: at most so many are lost in a kill, and so many are in memory."""
ABOUT = "samples.json"
PARTIAL = "partial"

Images = np.ndarray
"""uint8 [n, H, W, C]"""


class Job(NamedTuple):
    """The samples to generate: ``make(start, n)`` returns images ``start`` to ``start + n - 1``.

    ``identity`` (JSON data) determines the image and the label of each number. ``labels`` is int64 [count].
    ``columns`` is the number of columns of a grid.
    """

    make: Callable[[int, int], Images]
    labels: np.ndarray
    identity: dict[str, Any]
    columns: int

    @property
    def chunks(self) -> list[range]:
        count = len(self.labels)
        return [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]


def write_samples(
    out: Path,
    job: Job,
    *,
    rank: int = 0,
    world_size: int = 1,
    progress: Callable[[int], None] = lambda images: None,
) -> bool:
    """Write ``job`` to ``out``: .png is a grid, .npz an npz, anything else a folder.

    Returns False if other processes still generate chunks. Raises ``UserError`` for an output in progress
    with another ``identity``, or a folder with other content.
    """
    kinds: dict[str, type[_Output]] = {".png": _Grid, ".npz": _Npz}
    output = kinds.get(out.suffix, _Folder)(out, job)
    if output.finished():
        progress(len(job.labels))
        return True
    if world_size == 1 and output.at_once:
        output.finish(iter([job.make(0, len(job.labels))]))
        progress(len(job.labels))
        return True
    try:
        _work(output, rank / world_size, progress)
        with lock(output.partial / "finish.lock", wait=True):
            if not all(output.is_complete(number) for number in range(len(job.chunks))):
                return False
            output.finish(output.stored())
            shutil.rmtree(output.partial, ignore_errors=True)
    except FileNotFoundError:  # another process has finished and removed the directory
        if not output.exists():
            raise
    return True


def _work(output: _Output, part: float, progress: Callable[[int], None]) -> None:
    """Generate the missing chunks that are not locked, beginning at the fraction ``part`` in [0, 1)."""
    make_directory(output.partial)
    with lock(output.partial / "plan.lock", wait=True):
        plan = output.partial / "plan.json"
        if not plan.exists():
            replace_file(plan, output.plan())
        elif plan.read_text() != output.plan():
            raise UserError(
                f"{output.partial}: in progress with another generator or other options; rerun that "
                "command, or remove the directory"
            )
    chunks = output.job.chunks
    for turn in range(len(chunks)):
        number = (int(part * len(chunks)) + turn) % len(chunks)
        with lock(output.partial / f"{number:05d}.lock") as mine:
            if mine:
                if not output.is_complete(number):
                    output.store(number, output.job.make(chunks[number].start, len(chunks[number])))
                progress(len(chunks[number]))


class _Output(ABC):
    """An output that is written from its chunks; chunks are ``.npy`` files until all are complete."""

    def __init__(self, out: Path, job: Job) -> None:
        self.out, self.job = out, job
        self.partial = out.with_name(f".{out.name}.{PARTIAL}")
        self.at_once = len(job.chunks) == 1

    def plan(self) -> str:
        return _text(self.job.identity | {"count": len(self.job.labels), "columns": self.job.columns})

    def finished(self) -> bool:
        """Whether the output exists and belongs to this job."""
        return False

    def exists(self) -> bool:
        return self.out.exists()

    def is_complete(self, number: int) -> bool:
        return self._chunk(number).exists()

    def store(self, number: int, images: Images) -> None:
        with replacing(self._chunk(number)) as file:
            np.save(file, images, allow_pickle=False)

    def stored(self) -> Iterator[Images]:
        for number in range(len(self.job.chunks)):
            try:
                yield np.load(self._chunk(number), allow_pickle=False)
            except DAMAGE as error:
                raise UserError(
                    f"{self._chunk(number)}: damaged ({one_line(error)}); remove it and rerun"
                ) from None

    @abstractmethod
    def finish(self, chunks: Iterator[Images]) -> None:
        """Write the output from all its chunks."""

    def _chunk(self, number: int) -> Path:
        return self.partial / f"{number:05d}.npy"


class _Grid(_Output):
    def finish(self, chunks: Iterator[Images]) -> None:
        images = torch.from_numpy(np.concatenate(list(chunks))).permute(0, 3, 1, 2)
        replace_file(self.out, png(grid(images, self.job.columns)))


class _Npz(_Output):
    """``images`` uint8 [N, H, W, C], ``labels`` int64 [N] and ``about`` (JSON): uncompressed, streamed."""

    def finished(self) -> bool:
        try:
            found = read_npz(self.out, {"labels", "about"})
            same = str(found["about"]) == _text(self.job.identity)
            return same and np.array_equal(found["labels"], self.job.labels)
        except DAMAGE:
            return False

    def finish(self, chunks: Iterator[Images]) -> None:
        first = next(chunks)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self.job.labels), *first.shape[1:])}
        with replacing(self.out) as file, zipfile.ZipFile(file, "w") as archive:
            with archive.open(zipfile.ZipInfo("images.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                member.write(first.tobytes())
                for images in chunks:
                    member.write(images.tobytes())
            for name, array in (("labels", self.job.labels), ("about", np.array(_text(self.job.identity)))):
                with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)


class _Folder(_Output):
    """PNGs named by number and class; a chunk is complete if all its files exist. Can be extended."""

    def __init__(self, out: Path, job: Job) -> None:
        super().__init__(out, job)
        self.partial = out / f".{PARTIAL}"
        self.about = out / ABOUT
        self.at_once = False
        # The order matters: another process creates ``partial`` first and removes it after ``about``.
        occupied = out.is_dir() and any(out.iterdir())
        begun = self.partial.exists()
        if self.about.exists():
            self._check_same()
        elif occupied and not begun:
            raise UserError(f"{out}: contains other files; choose an empty folder")
        make_directory(out)
        self._there = {path.name for path in out.glob("*.png") if _has_content(path)}

    def _check_same(self) -> None:
        try:
            about = parse_json(self.about.read_text())
            count = int(about.pop("count"))
        except DAMAGE:
            raise UserError(f"{self.about}: damaged; expected JSON; choose an empty folder") from None
        if about != self.job.identity:
            raise UserError(
                f"{self.out}: contains samples of another generator or other options; choose another folder"
            )
        if count > len(self.job.labels):
            raise UserError(
                f"{self.out}: already contains {count} of these samples; choose another folder for fewer"
            )

    def plan(self) -> str:
        return _text(self.job.identity)

    def exists(self) -> bool:
        return self.about.exists()

    def is_complete(self, number: int) -> bool:
        paths = [self._file(i) for i in self.job.chunks[number]]
        return all(path.name in self._there or _has_content(path) for path in paths)

    def store(self, number: int, images: Images) -> None:
        for i, image in zip(self.job.chunks[number], images, strict=True):
            with replacing(
                self._file(i), durable=False
            ) as file:  # flushing each file would take most of the time
                file.write(png(image.squeeze(2) if image.shape[2] == 1 else image, quick=True))

    def stored(self) -> Iterator[Images]:
        return iter(())

    def finish(self, chunks: Iterator[Images]) -> None:
        replace_file(self.about, _text(self.job.identity | {"count": len(self.job.labels)}))

    def _file(self, number: int) -> Path:
        return self.out / f"{number:06d}-class{int(self.job.labels[number])}.png"


def _has_content(path: Path) -> bool:
    return path.exists() and path.stat().st_size > 0


def _text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
