"""A run's directory: its files, its lock and its recorded configuration."""

from __future__ import annotations

import contextlib
import dataclasses
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
import yaml

from diffratio_fast import launch
from diffratio_fast.config.options import changed_fields, flag, read_yaml, unrecorded
from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError
from diffratio_fast.runs.environment import environment
from diffratio_fast.runs.history import read_history
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage import reading
from diffratio_fast.storage.writing import (
    lock,
    make_directory,
    remove_abandoned,
    remove_file,
    replace_file,
)

PATIENCE = 60.0
"""Seconds that a launched process waits for the lock: an earlier process on another node may be exiting."""


class RunDirectory(RunPaths):
    """A run's files, its lock and its configuration."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._held = contextlib.ExitStack()
        self.taken = False
        """Whether this process holds the lock."""

    def take(self) -> None:
        """Lock the directory; raise ``UserError`` if another process holds the lock or it cannot be locked.

        A directory inside the run that is a symbolic link is an error: it would redirect writes.
        """
        for path in (self.checkpoint, self.samples, self.snapshots):
            if path.is_symlink():
                raise UserError(f"{path}: is a symbolic link; refused (give the run a directory of its own)")
        patience = PATIENCE if launch.launched() else 0.0
        try:
            mine = self._held.enter_context(lock(self.lock, wait=patience))
        except OSError as error:
            raise UserError(f"cannot write {self.lock}: {error.strerror or error}") from None
        if not mine:
            raise UserError(
                f"{self.root}: another process is training here; wait for it, or choose another --run-dir"
            )
        self.taken = True
        for path in (self.root, self.samples, self.snapshots):
            remove_abandoned(path)

    def open(self) -> None:
        """Create the directory and ``take`` it if this was not done yet; raise ``UserError`` on failure."""
        if not self.taken:
            make_directory(self.root)
            self.take()

    def close(self) -> None:
        self._held.close()
        self.taken = False

    def clear(self) -> None:
        """Remove the files of a run, and no others, for a new run; raise ``UserError`` on failure."""
        for path in (
            self.summary, self.generator, self.denoiser, self.ratio, self.ratio_average, self.refitted,
            self.metrics, self.history, self.config, self.measurements, self.neighbors, self.report,
            *self.loggers(),
        ):  # fmt: skip
            remove_file(path)
        for directory in (self.checkpoint, self.samples, self.snapshots):
            try:
                if directory.exists():
                    shutil.rmtree(directory)
            except OSError as error:
                raise UserError(f"cannot remove {directory}: {error.strerror or error}") from None

    def run_id(self) -> str | None:
        """The id of the run in this directory, generated at its first start; None if not recorded."""
        known = [line["run"] for line in read_history(self.history) if isinstance(line.get("run"), str)]
        return known[0] if known else None

    def older_values(self, config: RunConfig) -> dict[str, Any]:
        """Values of options that are newer than the run in this directory, needed to resume it.

        Raises ``UserError`` with the options in which ``config`` with these values differs from the run.
        """
        if not self.config.exists():
            raise UserError(
                f"{self.root}: a checkpoint without config.yaml; restore config.yaml, or start again with "
                "--fresh"
            )
        recorded = read_yaml(type(config), self.config)
        values = unrecorded(type(config), reading.read_yaml(self.config))
        old, config = type(config)(**recorded), dataclasses.replace(config, **values)
        changes = [
            f"{flag(name)} {getattr(old, name)} -> {getattr(config, name)}"
            for name in changed_fields(old, config)
        ]
        if changes:
            raise UserError(
                f"{self.root}: holds a run with other settings ({', '.join(changes)}); repeat its options or "
                f"--config {self.config} to continue it, choose another --run-dir and --resume-from "
                f"{self.root} to continue from it with other settings, or use --fresh"
            )
        return values

    def write_config(self, preset: str, config: RunConfig, device: torch.device, processes: int = 1) -> None:
        """Write config.yaml: the resolved configuration and the environment."""
        about = environment(device) | {"processes": processes}
        content = {"preset": preset, **dataclasses.asdict(config), "environment": about}
        replace_file(self.config, yaml.safe_dump(content, sort_keys=False))


def new_run_id() -> str:
    """A random name for a run (16 hexadecimal digits)."""
    return secrets.token_hex(8)
