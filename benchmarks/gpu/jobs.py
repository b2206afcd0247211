"""Commands with time limits, one after the other, with a log of each and a table of all."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio_fast.storage.writing import replace_file

ROOT = Path(__file__).resolve().parent.parent.parent
GRACE = 20.0
"""Seconds that a command has after SIGTERM, before it is killed."""


@dataclass(frozen=True)
class Job:
    """A command of at most ``limit`` seconds; skipped where the program ``needs`` is not installed."""

    name: str
    command: Sequence[str | Path]
    limit: float
    needs: str = ""


def stop(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """End a command and everything it started: by SIGTERM, then by SIGKILL."""
    for number, patience in ((signal.SIGTERM, grace), (signal.SIGKILL, 10.0)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
            return


class Jobs:
    """Runs jobs until ``deadline`` (of ``time.monotonic``); ``out`` gets NAME.log and jobs.json."""

    def __init__(self, out: Path, deadline: float) -> None:
        out.mkdir(parents=True, exist_ok=True)
        self.out, self.deadline = out, deadline
        self.rows: list[dict[str, Any]] = []

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def run(self, job: Job, until: Callable[[], bool] | None = None) -> str:
        """The job's outcome: "ok", "timed out", "status N" or why it was skipped.

        Where ``until`` comes true the job is ended by SIGTERM, and its outcome is "ok".
        """
        began = time.monotonic()
        outcome = self._outcome(job, until)
        self.rows.append(
            {
                "job": job.name, "outcome": outcome, "seconds": round(time.monotonic() - began, 1),
                "command": " ".join(map(str, job.command)).replace(str(self.out), "OUT"),
            }
        )  # fmt: skip
        replace_file(self.out / "jobs.json", json.dumps(self.rows, indent=1) + "\n")
        print(f"{job.name}: {outcome} ({self.rows[-1]['seconds']} s, {self.left():.0f} s left)", flush=True)
        return outcome

    def _outcome(self, job: Job, until: Callable[[], bool] | None) -> str:
        if job.needs and shutil.which(job.needs) is None:
            return f"skipped: {job.needs} is not installed"
        limit = min(job.limit, self.left() - GRACE)
        if limit <= 0:
            return "skipped: no time left"
        with (self.out / f"{job.name}.log").open("wb") as log:
            process = subprocess.Popen(
                list(map(str, job.command)), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
            end = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < end:
                if until is not None and until():
                    stop(process)
                    return "ok"
                time.sleep(0.2)
            if process.poll() is None:
                stop(process)
                return "timed out"
        return "ok" if process.returncode == 0 else f"status {process.returncode}"

    def failed(self) -> list[str]:
        """One line for each job that did not succeed, skipped ones included."""
        return [f"{row['job']}: {row['outcome']}" for row in self.rows if row["outcome"] != "ok"]

    def finish(self) -> int:
        """Print what failed last; the exit status."""
        for line in self.failed():
            print(line if "skipped" in line else f"FAILED {line} (see {line.partition(':')[0]}.log)")
        return 1 if any("skipped" not in line for line in self.failed()) else 0
