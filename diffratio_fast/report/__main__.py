"""python -m diffratio_fast.report RUN ...: rewrite a report, compare runs, or serve a live view."""

from __future__ import annotations

from pathlib import Path

from diffratio_fast import command, report
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import DEFAULT_RUN, RunPaths


def parser() -> command.Parser:
    """The command line."""
    result = command.Parser(
        prog="python -m diffratio_fast.report",
        description="Rewrite report.html of a run from the files of its directory; of several runs, write a "
        "page that compares them; with --serve, show the report of a run while it trains.",
    )
    result.add_argument(
        "runs", type=Path, nargs="*", default=[DEFAULT_RUN], metavar="RUN", help="run directories"
    )
    result.add_argument(
        "--out", type=Path, default=Path("comparison.html"), metavar="FILE", help="page of several runs"
    )
    result.add_argument(
        "--serve", action="store_true", help="serve the report on 127.0.0.1, refreshed every 10 seconds"
    )
    result.add_argument(
        "--port", type=int, default=8000, metavar="N", help="port of --serve; 0: any free one"
    )
    return result


def main(argv: list[str]) -> int:
    """Run the command."""
    arguments = parser().parse_args(argv)
    runs: list[Path] = arguments.runs
    for run in runs:
        if not RunPaths(run).config.exists():
            raise UserError(f"{run}: not a run directory (no config.yaml); expected the directory of a run")
    if arguments.serve:
        if len(runs) > 1:
            raise UserError(f"--serve shows one run, not {len(runs)}; name one run directory")
        return _serve(runs[0], arguments.port)
    if len(runs) > 1:
        from diffratio_fast.report.compare import compare

        print(f"{compare(runs, arguments.out)}: written")
        return 0
    print(f"{report.write(runs[0])}: written")
    return 0


def _serve(run: Path, port: int) -> int:
    from diffratio_fast.report.serve import server

    if not 0 <= port < 2**16:
        raise UserError(f"--port must be between 0 and 65535, not {port}")
    try:
        serving = server(run, port)
    except OSError as error:
        raise UserError(f"--port {port}: cannot listen ({error.strerror}); choose another port") from None
    print(f"http://127.0.0.1:{serving.server_port}/ shows {run}; Ctrl-C ends", flush=True)
    with serving:
        serving.serve_forever()
    return 0


if __name__ == "__main__":
    command.run(main)
