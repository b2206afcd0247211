"""Checkpoints: a run's whole state on disk, written in the background, never half there.

``checkpoint/step-00001000/`` holds safetensors files, one of each process, and ``index.json``, which names
them with their sizes and digests. Several processes write and read them by ``torch.distributed.checkpoint``,
each its part, so that any number of processes can go on; one process writes the same format whole. All of it
is JSON and plain numbers: loading runs no code.

A checkpoint is written beside its place, flushed to disk, read back and compared with what was meant, and
only then renamed into place, which is the commit. The one before it is kept too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, one_line, parse_json
from diffratio_fast.storage.writing import make_directory, sync_directory
from diffratio_fast.training.processes.world import MAIN_TIMEOUT, World
from diffratio_fast.training.state.run_state import RunState

FORMAT = "diffratio_fast.checkpoint.2"
INDEX = "index.json"
KEPT = 2
ADVICE = "restore it from a copy, or start over with --fresh"
_NAME = re.compile(r"step-\d{8,}")


def candidates(root: Path) -> list[Path]:
    """The checkpoints below ``root`` by their names, the newest first."""
    found = [path for path in root.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def exists(root: Path) -> bool:
    """Whether there is a checkpoint, of whatever state or version."""
    return bool(candidates(root)) or (root / "state.safetensors").exists()


class Damaged(Exception):
    """A checkpoint is not what was written; the message says in what way."""


def read_index(path: Path) -> dict[str, Any]:
    """The index of the checkpoint ``path``, every file of which is as it was written; else ``Damaged``."""
    try:
        index: dict[str, Any] = parse_json((path / INDEX).read_bytes())
        if index["format"] != FORMAT:
            raise UserError(f"{path}: not a checkpoint of this version of diffratio_fast; {ADVICE}")
        if index.pop("digest") != _digest_of_index(index):
            raise Damaged(f"the digest of {INDEX} does not match")
        files: dict[str, Any] = index["files"]
        if not files or {file.name for file in path.glob("*.safetensors")} != set(files):
            raise Damaged(f"{INDEX} names other files than there are")
        for name, about in files.items():
            check_file(path / name, about)
    except OSError as error:
        raise Damaged(f"{Path(error.filename or INDEX).name}: {error.strerror or error}") from None
    except DAMAGE:
        raise Damaged(f"{INDEX} is no index") from None
    return index


def check_file(path: Path, about: dict[str, Any]) -> None:
    """See that a file has the size and the digest that ``about`` says; else ``Damaged``."""
    size = path.stat().st_size
    if size != about["bytes"]:
        raise Damaged(f"{path.name} has {size} bytes in place of {about['bytes']}")
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while content := file.read(8 << 20):
            digest.update(content)
    if digest.hexdigest() != about["xxh3_128"]:
        raise Damaged(f"the digest of {path.name} does not match")


def _digest_of_index(index: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(index, sort_keys=True).encode())


class Checkpoints:
    """Those of one run: saved one at a time while the run goes on, loaded once at its start."""

    def __init__(self, root: Path, world: World) -> None:
        self.root, self.world = root, world
        self.good: list[str] = []
        """Names of checkpoints known to be whole, oldest first."""
        self.step = 0
        """Of the state saved last."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failure: str | None = None
        # between the threads that write: they must not get between the collectives of training
        self._group = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT) if world.size > 1 else None
        self._stager: Any = None

    # -- loading

    def load(self, state: RunState, say: Callable[[str], None] = print) -> None:
        """Bring ``state`` to the newest whole checkpoint; ``say`` a line for each damaged one.

        A ``UserError`` where none is whole; nothing on disk is changed.
        """
        path, index = self.world.on_main(lambda: self._choose(say))
        try:
            with self.world.together():
                try:
                    _read(path, sorted(index["files"]), state)
                except (SafetensorError, RuntimeError, AssertionError, *DAMAGE) as error:
                    reason = one_line(error)[:200]
                    raise UserError(
                        f"{path}: the checkpoint does not fit this run ({reason}); {ADVICE}"
                    ) from None
        finally:
            self.good = [path.name]
        state.step, state.seconds, state.best = index["step"], index["seconds"], index["best"]

    def _choose(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
        said = []
        for path in candidates(self.root):
            try:
                index = read_index(path)
            except Damaged as damage:
                said.append(f"{path}: the checkpoint is damaged ({damage})")
                continue
            for line in said:
                say(f"{line}; continuing from {path.name}")
            return path, index
        if not said:
            raise UserError(f"{self.root}: not a checkpoint of this version of diffratio_fast; {ADVICE}")
        raise UserError(f"{'; '.join(said)}; {ADVICE}")

    # -- saving

    def save(self, state: RunState) -> None:
        """Copy the state and begin to write it; one that is still being written is waited for first."""
        self.wait()
        name, self.step = f"step-{state.step:08d}", state.step
        if self.good and self.good[-1] == name:
            return
        tensors = {key: tensor.detach().contiguous() for key, tensor in state.tensors()}
        staged = self._stage(tensors)
        about = {"format": FORMAT, "step": state.step, "seconds": state.seconds, "best": state.best}
        self._thread = threading.Thread(
            target=self._run, args=(name, staged, about), name="diffratio-checkpoint", daemon=True
        )
        self._thread.start()

    @property
    def failed(self) -> bool:
        """Whether a save has come to grief that ``failure`` has not told of yet."""
        return self._failure is not None or self._error is not None

    def failure(self) -> str | None:
        """Wait for what is being written; why it could not be saved, told once, or None.

        The same on all processes. What another process's death leaves behind is raised.
        """
        self.wait()
        if self._error is not None:
            raise self._error
        message, self._failure = self._failure, None
        return message

    def wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self, patience: float) -> None:
        """Wait for what is being written, though no longer than ``patience`` seconds."""
        if self._thread is not None:
            self._thread.join(patience)

    def _stage(self, tensors: dict[str, Tensor]) -> dict[str, Any]:
        if self.world.size == 1:
            return {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        if self._stager is None:
            from diffratio_fast.training.state.sharded import stager

            self._stager = stager()
        staged: dict[str, Any] = self._stager.stage(tensors)
        return staged

    def _run(self, name: str, staged: dict[str, Any], about: dict[str, Any]) -> None:
        """What the thread does."""
        try:
            self._failure = self._write(name, staged, about)
            if self._failure is None:
                self.good.append(name)
        except BaseException as error:
            self._error = error

    def _write(self, name: str, staged: dict[str, Any], about: dict[str, Any]) -> str | None:
        """Write a checkpoint and commit it; why that failed (on all processes alike), or None."""
        temporary = self.root / f"{name}.tmp"
        files: dict[str, dict[str, Any]] = {}
        problem = None
        try:
            if self.world.main:
                make_directory(self.root)
                shutil.rmtree(temporary, ignore_errors=True)
            if self._group is None:
                _write_whole(temporary, staged, files)
            else:
                from diffratio_fast.training.state.sharded import write_part

                write_part(temporary, staged, files, self._group)
            for file, expected in files.items():
                check_file(temporary / file, expected)
        except (UserError, OSError, Damaged) as error:
            problem = getattr(error, "strerror", None) or str(error)
        parts = [(problem, files)]
        if self._group is not None:
            parts = [(None, {})] * self.world.size
            dist.all_gather_object(parts, (problem, files), group=self._group)
        answer = [next((text for text, _ in parts if text), None)]
        if self.world.main:
            if answer[0] is None:
                everything = {file: what for _, part in parts for file, what in part.items()}
                answer = [self._commit(temporary, about | {"files": everything})]
            if answer[0] is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        if self._group is not None:
            dist.broadcast_object_list(answer, 0, group=self._group)
        return answer[0]

    def _commit(self, temporary: Path, index: dict[str, Any]) -> str | None:
        place = temporary.with_suffix("")
        try:
            _write_file(
                temporary / INDEX, json.dumps(index | {"digest": _digest_of_index(index)}, indent=1).encode()
            )
            sync_directory(temporary)
            read_index(temporary)
            shutil.rmtree(place, ignore_errors=True)  # a damaged one, which this run has done again
            os.rename(temporary, place)
            sync_directory(self.root)
        except (OSError, Damaged) as error:
            return getattr(error, "strerror", None) or str(error)
        keep = {place.name, *self.good[1 - KEPT :]}
        for path in self.root.iterdir():
            if path.is_dir() and path.name not in keep and _NAME.fullmatch(path.name.removesuffix(".tmp")):
                shutil.rmtree(path, ignore_errors=True)
        return None


def _write_file(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _about(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


def _write_whole(directory: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
    directory.mkdir()
    name = "shard-00001-model-00001-of-00001.safetensors"
    content = safetensors.torch.save(tensors)
    files[name] = _about(content)
    _write_file(directory / name, content)


def _read(path: Path, files: list[str], state: RunState) -> None:
    if len(files) > 1 or state.sharded:
        from diffratio_fast.training.state.sharded import read_parts

        state.restore(read_parts(path, state))
        return
    with safe_open(path / files[0], "pt") as file:
        state.restore({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
