"""What every command shares: one-line errors, exit status 2, a quiet parser."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from diffratio_fast.errors import Interrupted, ReportedElsewhere, UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there is something to show."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default is None or action.default is False
        return action.help if silent else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, **kwargs: object) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(**kwargs)  # type: ignore[arg-type]

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run ``main(argv)`` as a process: its return value is the exit status, ``UserError`` is 2."""
    try:
        status = main(sys.argv[1:])
    except ReportedElsewhere:
        status = 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except Interrupted as stopped:
        status = 128 + stopped.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of a pipe (`| head`) has left
        status = 1
    sys.exit(status or 0)
