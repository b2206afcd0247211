"""Training in pieces of bounded time, on machines that come and go.

    python -m benchmarks.gpu.pieces --run-dir DIR [--from DIR] [--out DIR] PRESET [option of train ...]

Resumes the run in ``--run-dir``; where there is none, first copies the one that an earlier piece left in
``--from``. Ends the training by SIGTERM in time for a clean save, and copies to ``--out`` what the next piece
needs.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from benchmarks.gpu.jobs import Job, Jobs
from diffratio_fast import command
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import RunPaths

SAVING = 60.0
"""Seconds before the time limit at which the training is asked to save and to copy the run."""


def newest_checkpoint(run: RunPaths) -> Path | None:
    found = sorted(run.checkpoint.glob("step-*")) if run.checkpoint.is_dir() else []
    return found[-1] if found else None


def bring(source: Path, run: RunPaths) -> None:
    """Copy an earlier piece's run directory to where this piece trains."""
    if newest_checkpoint(RunPaths(source)) is None:
        raise UserError(
            f"--from {source}: no run with a checkpoint; expected the output directory of an earlier piece"
        )
    shutil.copytree(source, run.root)


def take(run: RunPaths, out: Path) -> None:
    """Copy the run directory, of its checkpoints the newest; ``out`` is replaced only by a complete copy."""
    newest = newest_checkpoint(run)

    def older(folder: str, names: list[str]) -> list[str]:
        if Path(folder) != run.checkpoint:
            return [name for name in names if name == run.lock.name]
        return [
            name for name in names if name.startswith("step-") and newest is not None and name != newest.name
        ]

    temporary = out.with_name(out.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(run.root, temporary, ignore=older)
    shutil.rmtree(out, ignore_errors=True)
    temporary.rename(out)


def due(end: float) -> bool:
    """Whether the training is to save and end now."""
    return time.monotonic() >= end


def main(argv: list[str]) -> int:
    began = time.monotonic()
    parser = command.Parser(prog="python -m benchmarks.gpu.pieces", description=__doc__)
    parser.add_argument(
        "--run-dir", type=Path, required=True, metavar="DIR", help="the run that is continued"
    )
    parser.add_argument("--from", type=Path, dest="source", metavar="DIR", help="what an earlier piece left")
    parser.add_argument("--out", type=Path, metavar="DIR", help="copy the run here, as DIR/run")
    parser.add_argument("--time-limit", type=float, default=570.0, metavar="SECONDS")
    options, training = parser.parse_known_args(argv)
    run = RunPaths(options.run_dir.resolve())
    out = (options.out or run.root.with_name(run.root.name + "-piece")).resolve()
    jobs = Jobs(out, began + options.time_limit)
    if options.source is not None and newest_checkpoint(run) is None:
        bring(options.source, run)
    line: list[str | Path] = [sys.executable, "-m", "diffratio_fast.train", *training, "--run-dir", run.root]
    end = began + options.time_limit - SAVING
    outcome = jobs.run(Job("train", line, options.time_limit), until=lambda: due(end))
    print((out / "train.log").read_text().splitlines()[-1:])
    newest = newest_checkpoint(run)
    if newest is not None:
        take(run, out / "run")
    if run.summary.exists():
        print("the training is finished")
    elif newest is not None and outcome == "ok":
        print(f"saved {newest.name}; continue by the same command, elsewhere with --from {out / 'run'}")
    return jobs.finish()


if __name__ == "__main__":
    command.run(main)
