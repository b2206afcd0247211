"""``python -m diffratio_fast`` and ``diffratio``: the commands with one line each, and each by its name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import NoReturn

import diffratio_fast
from diffratio_fast import command
from diffratio_fast.errors import UserError


def overview() -> str:
    """The commands as text."""
    width = max(map(len, command.COMMANDS))
    lines = [f"  {command.program}{name:{width}}  {text}" for name, text in command.COMMANDS.items()]
    return "\n".join(
        [
            f"diffratio_fast {diffratio_fast.__version__}: one-step image generators without a teacher",
            "",
            *lines,
            "",
            "Each has --help. The first run, about a minute on one CPU core: " + command.program + "train",
        ]
    )


def load(name: str) -> Callable[[list[str]], int | None]:
    """The ``main`` of a command; an unknown one is a ``UserError``."""
    if name not in command.COMMANDS:
        hint = command.did_you_mean(name, command.COMMANDS) or f"; known: {', '.join(command.COMMANDS)}"
        raise UserError(f"no such command: {name}{hint}")
    module = f"diffratio_fast.{name}"
    return importlib.import_module(f"{module}.__main__" if name == "report" else module).main


def main(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"diffratio_fast {diffratio_fast.__version__}")
        return 0
    return load(argv[0])(argv[1:])


def entry() -> NoReturn:
    """The console script ``diffratio``."""
    command.program = "diffratio "
    command.run(main, sys.argv[1:])


if __name__ == "__main__":
    command.run(main)
