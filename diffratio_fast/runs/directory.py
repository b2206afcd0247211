"""A run's directory: where each file lies, who may write there, and what was asked for."""

from __future__ import annotations

import dataclasses
import fcntl
import shutil
from pathlib import Path
from typing import IO

import torch
import yaml

from diffratio_fast.config.options import changed_fields, read_yaml
from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError
from diffratio_fast.runs.environment import environment
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.writing import make_directory, replace_file


class RunDirectory(RunPaths):
    """A run's files, its lock and its configuration."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self._lock: IO[str] | None = None

    def open(self) -> None:
        """Create the directory and hold it against a second process; a ``UserError`` where that fails."""
        make_directory(self.root)
        try:
            self._lock = open(self.lock, "w")  # noqa: SIM115
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{self.root}: another process is training there") from None
        except OSError as error:
            raise UserError(f"cannot write in {self.root}: {error.strerror or error}") from None

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def clear(self) -> None:
        """Remove a run's files, and no others, for a fresh start."""
        files = [
            self.summary,
            self.generator,
            self.denoiser,
            self.ratio,
            self.ratio_average,
            self.refitted,
            self.metrics,
        ]
        files += [self.config, self.measurements, self.neighbours, self.report, *self.events()]
        for path in files:
            path.unlink(missing_ok=True)
        for directory in (self.checkpoint, self.samples, self.snapshots):
            shutil.rmtree(directory, ignore_errors=True)

    def check_same(self, config: RunConfig) -> None:
        """See that ``config`` would train as the run that is here; a ``UserError`` names the differences."""
        if not self.config.exists():
            raise UserError(
                f"{self.root}: has a checkpoint but no config.yaml; restore it, or start over with --fresh"
            )
        old = type(config)(**read_yaml(type(config), self.config))
        changes = [
            f"{name} {getattr(old, name)} -> {getattr(config, name)}" for name in changed_fields(old, config)
        ]
        if changes:
            raise UserError(
                f"{self.root}: holds a run with other settings ({', '.join(changes)}); repeat its options or "
                f"--config {self.config} to continue it, choose another --run-dir, or use --fresh"
            )

    def write_config(self, preset: str, config: RunConfig, device: torch.device, processes: int = 1) -> None:
        """config.yaml: the resolved configuration and what it runs on."""
        about = environment(device) | {"processes": processes}
        content = {"preset": preset, **dataclasses.asdict(config), "environment": about}
        replace_file(self.config, yaml.safe_dump(content, sort_keys=False))
