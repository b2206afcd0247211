"""Checkpoints: a run's whole state on disk, written atomically in the background.

Several processes write and read them by ``torch.distributed.checkpoint``, each its part, so that any number
of processes can continue; one process writes the same format. ``storage.checkpoints`` describes the files.

A checkpoint is written beside its place, flushed to disk, read back and compared with what was meant, and
only then renamed into place, which is the commit. The one before it is kept too.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
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
from diffratio_fast.storage.checkpoints import (
    ADVICE,
    FORMAT,
    INDEX,
    NAME,
    Damaged,
    Retention,
    candidates,
    check_file,
    digest_of_index,
    kept,
    name_of,
    read_index,
    step_of,
)
from diffratio_fast.storage.reading import DAMAGE, one_line
from diffratio_fast.storage.writing import make_directory, sync_directory
from diffratio_fast.training.processes.world import MAIN_TIMEOUT, World
from diffratio_fast.training.state.identity import Identity
from diffratio_fast.training.state.run_state import RunState


class Checkpoints:
    """Those of one run: saved one at a time while the run goes on, loaded once at its start."""

    def __init__(self, root: Path, world: World, policy: Retention | None = None) -> None:
        self.root, self.world, self.policy = root, world, policy or Retention()
        self.identity: Identity | None = None
        """Written into each."""
        self.network: dict[str, Any] | None = None
        """Description of the averaged generator, by which ``sample`` builds it."""
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

    def load(
        self,
        state: RunState,
        say: Callable[[str], None] = print,
        check: Callable[[Path, dict[str, Any]], None] = lambda path, index: None,
    ) -> dict[str, Any]:
        """Bring ``state`` to the newest complete checkpoint, and its index; ``say`` a line for each damaged.

        A ``UserError`` where none is complete, or ``check`` refuses it; nothing on disk is changed.
        """
        path, index = self.world.on_main(lambda: self._choose(say, check))
        try:
            self._fill(state, path, index)
        finally:
            self.good = [path.name]
        return index

    def load_from(
        self, root: Path, step: int | None, state: RunState, check: Callable[[Path, dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Bring ``state`` to a checkpoint of another run (default: its newest complete one); its index."""
        path, index = self.world.on_main(lambda: _chosen_from(root, step, check))
        self._fill(state, path, index)
        return index

    def _fill(self, state: RunState, path: Path, index: dict[str, Any]) -> None:
        with self.world.together():
            try:
                _read(path, sorted(index["files"]), state)
            except (SafetensorError, RuntimeError, AssertionError, *DAMAGE) as error:
                reason = one_line(error)[:200]
                raise UserError(
                    f"{path}: the checkpoint does not fit this run ({reason}); {ADVICE}"
                ) from None
        state.step, state.seconds, state.best = index["step"], index["seconds"], index["best"]

    def _choose(
        self, say: Callable[[str], None], check: Callable[[Path, dict[str, Any]], None]
    ) -> tuple[Path, dict[str, Any]]:
        said = []
        for path in candidates(self.root):
            try:
                index = read_index(path)
            except Damaged as damage:
                said.append(f"{path}: the checkpoint is damaged ({damage})")
                continue
            check(path, index)
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
        name, self.step = name_of(state.step), state.step
        if self.good and self.good[-1] == name:
            return
        tensors = {key: tensor.detach().contiguous() for key, tensor in state.tensors()}
        staged = self._stage(tensors)
        about = {"format": FORMAT, "step": state.step, "seconds": state.seconds, "best": state.best}
        if self.identity is not None:
            about["identity"] = dataclasses.asdict(self.identity)
        if self.network is not None:
            about["network"] = self.network
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
        problem = self._shared(self._prepare(temporary) if self.world.main else None)
        if problem is not None:  # before any process enters the collectives of write_part
            return problem
        try:
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
        problem = next((text for text, _ in parts if text), None)
        if self.world.main:
            if problem is None:
                everything = {file: what for _, part in parts for file, what in part.items()}
                problem = self._commit(temporary, about | {"files": everything})
            if problem is not None:
                _remove(temporary)
        return self._shared(problem)

    def _shared(self, problem: str | None) -> str | None:
        """Rank 0's ``problem``, on all processes."""
        answer = [problem]
        if self._group is not None:
            dist.broadcast_object_list(answer, 0, group=self._group)
        return answer[0]

    def _prepare(self, temporary: Path) -> str | None:
        """Make room for a checkpoint; why that failed, or None."""
        try:
            make_directory(self.root, root=self.root.parent)
        except UserError as error:
            return str(error)
        _remove(temporary)
        return None

    def _commit(self, temporary: Path, index: dict[str, Any]) -> str | None:
        place = temporary.with_suffix("")
        try:
            _write_file(
                temporary / INDEX, json.dumps(index | {"digest": digest_of_index(index)}, indent=1).encode()
            )
            sync_directory(temporary)
            read_index(temporary)
            _remove(place)  # a damaged one, which this run has done again
            os.rename(temporary, place)
            sync_directory(self.root)
        except (OSError, Damaged) as error:
            return getattr(error, "strerror", None) or str(error)
        self._remove_others(step_of(place.name), index["best"].get("step"))
        return None

    def _remove_others(self, step: int, best: int | None) -> None:
        """Remove what the policy does not keep, and what lies after ``step``: of work that was undone."""
        with contextlib.suppress(OSError):  # tried again with the next checkpoint
            steps = [found for path in candidates(self.root) if (found := step_of(path.name)) <= step]
            keep = {name_of(one) for one in kept(steps, self.policy, best)}
            for path in self.root.iterdir():
                if path.name not in keep and NAME.fullmatch(path.name.removesuffix(".tmp")):
                    _remove(path)


def _chosen_from(
    root: Path, step: int | None, check: Callable[[Path, dict[str, Any]], None]
) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of another run, complete and accepted by ``check``; else a ``UserError``."""
    found = candidates(root)
    there = ", ".join(str(step_of(path.name)) for path in reversed(found)) or "none"
    if step is not None:
        found = [path for path in found if step_of(path.name) == step]
    problem = f"there is none of step {step} (those there: {there})" if step is not None else "there is none"
    for path in found:
        try:
            index = read_index(path)
        except Damaged as damage:
            problem = f"{path.name} is damaged: {damage} (those there: {there})"
            continue
        check(path, index)
        return path, index
    raise UserError(f"--resume-from: no checkpoint to use in {root}: {problem}")


def _remove(path: Path) -> None:
    """Remove a directory, or a link or file in its place; nothing happens where that fails."""
    if path.is_symlink() or path.is_file():
        with contextlib.suppress(OSError):
            path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _write_file(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
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
