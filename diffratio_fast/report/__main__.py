"""python -m diffratio_fast.report RUN: rewrite report.html from the files of the run directory."""

from __future__ import annotations

from pathlib import Path

from diffratio_fast import command, report
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import DEFAULT_RUN, RunPaths


def main(argv: list[str]) -> int:
    parser = command.Parser(
        prog="python -m diffratio_fast.report",
        description="Rewrite report.html of a run from the files of its directory.",
    )
    parser.add_argument("run", type=Path, nargs="?", default=DEFAULT_RUN, metavar="RUN", help="run directory")
    run: Path = parser.parse_args(argv).run
    if not RunPaths(run).config.exists():
        raise UserError(f"{run}: not a run directory (no config.yaml); expected the directory of a run")
    print(f"{report.write(run)}: written")
    return 0


if __name__ == "__main__":
    command.run(main)
