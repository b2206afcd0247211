"""The start of a run: new, from its own newest checkpoint, or from another run's. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffratio_fast.errors import UserError


@dataclass(frozen=True)
class Source:
    """RUN@STEP of ``--resume-from``; without a step the newest checkpoint."""

    run: Path
    step: int | None = None

    @classmethod
    def parse(cls, text: str) -> Source:
        run, at, step = text.rpartition("@")
        if at and step.isdecimal() and len(step) < 12:
            return cls(Path(run), int(step))
        return cls(Path(text))

    def __str__(self) -> str:
        return f"{self.run}" if self.step is None else f"{self.run}@{self.step}"

    def require_config(self) -> Path:
        """The run's config.yaml; raises ``UserError`` if it does not exist."""
        path = self.run / "config.yaml"
        if not path.is_file():
            raise UserError(f"--resume-from {self}: {self.run} has no config.yaml; expected a run directory")
        return path


@dataclass(frozen=True)
class Beginning:
    """Options of the command line about the start of a run, not part of its configuration.

    ``fresh`` removes an existing run; ``accept_data`` resumes with other data than those of the checkpoint;
    ``source`` is the checkpoint that a run without a checkpoint of its own begins from.
    """

    fresh: bool = False
    accept_data: bool = False
    source: Source | None = None


ORDINARY = Beginning()
