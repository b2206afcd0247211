"""Shared by all commands: one-line errors, exit status 2, argument parser."""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable
from typing import NoReturn

from diffratio_fast.errors import Interrupted, ReportedElsewhere, UserError


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults that are not None, False or empty."""

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


LINE_LIMIT = 2000
"""Maximum characters of an error line."""
_NO_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|storage size calculation", re.I)
"""Patterns of PyTorch's RuntimeErrors for a lack of memory."""


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run ``main(argv)`` and exit with its return value; ``UserError`` exits with 2.

    A lack of memory and unhandled errors of the file system are also one line and status 2.
    """
    try:
        status = main(sys.argv[1:])
    except ReportedElsewhere:
        status = 2
    except UserError as error:
        status = _failed(str(error))
    except Interrupted as stopped:
        status = 128 + stopped.number
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except BrokenPipeError:  # the reader of the pipe (`| head`) has exited
        status = 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        status = _failed(f"{where}{error.strerror or error}")
    except MemoryError as error:
        status = _failed(_out_of_memory(error))
    except RuntimeError as error:
        if not _NO_MEMORY.search(str(error)):
            raise
        status = _failed(_out_of_memory(error))
    sys.exit(status or 0)


def _failed(message: str) -> int:
    text = " ".join(message.split())
    if len(text) > LINE_LIMIT:
        text = f"{text[:LINE_LIMIT]} ..."
    with contextlib.suppress(OSError):
        print(f"error: {text}", file=sys.stderr)
    return 2


def _out_of_memory(error: BaseException) -> str:
    """The message for a lack of memory: the requested amount, if known, and what to do."""
    detail = " ".join(str(error)[:300].split())
    return (
        f"out of memory{f' ({detail})' if detail else ''}; use smaller networks, batches (--micro-batch) or "
        "files, or a machine with more memory"
    )
