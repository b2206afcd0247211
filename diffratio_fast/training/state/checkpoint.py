"""Checkpoints: the complete state of a run on disk, written atomically in the background.

Several processes write and read them with ``torch.distributed.checkpoint``, each its part, so that any number
of processes can resume; a single process writes the same format. ``storage.checkpoints`` describes the files.

A checkpoint is written to a temporary directory, flushed to disk, read back, compared with the written data,
and renamed, which is the commit. The previous checkpoint is kept too.
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
    """The checkpoints of a run: one save at a time in the background, one load at the start."""

    def __init__(self, root: Path, world: World, policy: Retention | None = None) -> None:
        self.root, self.world, self.policy = root, world, policy or Retention()
        self.identity: Identity | None = None
        """The identity in every checkpoint."""
        self.network: dict[str, Any] | None = None
        """Metadata of the averaged generator, for ``sample``."""
        self.good: list[str] = []
        """Names of checkpoints that are known to be intact, oldest first."""
        self.step = 0
        """Step of the last saved state."""
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._failure: str | None = None
        # separate groups for the writing threads: they must not interleave with the collectives of training
        self._group = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT) if world.size > 1 else None
        self._stager: Any = None

    # -- loading

    def load(
        self,
        state: RunState,
        warn: Callable[[str], None] = print,
        check: Callable[[Path, dict[str, Any]], None] = lambda path, index: None,
    ) -> dict[str, Any]:
        """Load the newest intact checkpoint into ``state`` and return its index; ``warn`` of damaged ones.

        Raises ``UserError`` if none is intact, or ``check`` rejects it; nothing on disk is changed.
        """
        path, index = self.world.on_main(lambda: self._choose(warn, check))
        try:
            self._fill(state, path, index)
        finally:
            self.good = [path.name]
        return index

    def load_from(
        self, root: Path, step: int | None, state: RunState, check: Callable[[Path, dict[str, Any]], None]
    ) -> dict[str, Any]:
        """Load a checkpoint of another run (default: the newest intact one) and return its index."""
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
                    f"{path}: the checkpoint does not match this run ({reason}); {ADVICE}"
                ) from None
        state.step, state.seconds, state.best = index["step"], index["seconds"], index["best"]

    def _choose(
        self, warn: Callable[[str], None], check: Callable[[Path, dict[str, Any]], None]
    ) -> tuple[Path, dict[str, Any]]:
        lines = []
        for path in candidates(self.root):
            try:
                index = read_index(path)
            except Damaged as damage:
                lines.append(f"{path}: the checkpoint is damaged ({damage})")
                continue
            check(path, index)
            for line in lines:
                warn(f"{line}; resuming from {path.name}")
            return path, index
        if not lines:
            raise UserError(f"{self.root}: not a checkpoint of this version of diffratio_fast; {ADVICE}")
        raise UserError(f"{'; '.join(lines)}; {ADVICE}")

    # -- saving

    def save(self, state: RunState) -> None:
        """Copy the state and begin to write it; waits for a save in progress first."""
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
        """Whether a save has failed and ``failure`` has not reported it yet."""
        return self._failure is not None or self._error is not None

    def failure(self) -> str | None:
        """Wait for the save in progress; return the reason of a failure once, or None.

        The result is the same on all processes. Errors after the end of another process are raised.
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
        """Wait at most ``patience`` seconds for the save in progress."""
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
        """Main function of the writing thread."""
        try:
            self._failure = self._write(name, staged, about)
            if self._failure is None:
                self.good.append(name)
        except BaseException as error:
            self._error = error

    def _write(self, name: str, staged: dict[str, Any], about: dict[str, Any]) -> str | None:
        """Write and commit a checkpoint; return the reason of a failure, the same on all processes."""
        temporary = self.root / f"{name}.tmp"
        files: dict[str, dict[str, Any]] = {}
        problem = self._shared(self._prepare(temporary) if self.world.main else None)
        if problem is not None:  # no process has entered the collectives of write_part yet
            return problem
        try:
            if self._group is None:
                _write_complete(temporary, staged, files)
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
        """Broadcast rank 0's ``problem`` to all processes."""
        answer = [problem]
        if self._group is not None:
            dist.broadcast_object_list(answer, 0, group=self._group)
        return answer[0]

    def _prepare(self, temporary: Path) -> str | None:
        """Create the temporary directory; return the reason of a failure, or None."""
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
            _remove(place)  # a damaged checkpoint that this run has repeated
            os.rename(temporary, place)
            sync_directory(self.root)
        except (OSError, Damaged) as error:
            return getattr(error, "strerror", None) or str(error)
        self._remove_others(step_of(place.name), index["best"].get("step"))
        return None

    def _remove_others(self, step: int, best: int | None) -> None:
        """Remove checkpoints that the policy does not keep, and those after ``step``, of lost work."""
        with contextlib.suppress(OSError):  # retried with the next checkpoint
            steps = [found for path in candidates(self.root) if (found := step_of(path.name)) <= step]
            keep = {name_of(one) for one in kept(steps, self.policy, best)}
            for path in self.root.iterdir():
                if path.name not in keep and NAME.fullmatch(path.name.removesuffix(".tmp")):
                    _remove(path)


def _chosen_from(
    root: Path, step: int | None, check: Callable[[Path, dict[str, Any]], None]
) -> tuple[Path, dict[str, Any]]:
    """Find an intact checkpoint of another run that ``check`` accepts; otherwise raise ``UserError``."""
    found = candidates(root)
    there = ", ".join(str(step_of(path.name)) for path in reversed(found)) or "none"
    if step is not None:
        found = [path for path in found if step_of(path.name) == step]
    problem = f"none at step {step} (available: {there})" if step is not None else "none"
    for path in found:
        try:
            index = read_index(path)
        except Damaged as damage:
            problem = f"{path.name} is damaged: {damage} (available: {there})"
            continue
        check(path, index)
        return path, index
    raise UserError(f"--resume-from: no usable checkpoint in {root}: {problem}")


def _remove(path: Path) -> None:
    """Remove a directory, or a link or file in its place; errors are ignored."""
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


def _write_complete(directory: Path, tensors: dict[str, Tensor], files: dict[str, dict[str, Any]]) -> None:
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
