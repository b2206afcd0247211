"""What every command shares: one-line errors, exit status 2, short and full help."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
import sys
from collections.abc import Callable, Collection, Iterable
from typing import Any, NoReturn

from diffratio_fast.errors import Interrupted, ReportedElsewhere, UserError

MODULE = "python -m diffratio_fast."
program = MODULE
"""How commands are called in messages: ``python -m diffratio_fast.NAME``, or ``diffratio NAME``."""


COMMANDS = {
    "train": "train a one-step generator by DiffRatio",
    "sample": "images from a trained generator",
    "evaluate": "metrics of generated images against real ones, with their floors",
    "report": "write a run's report again",
    "prepare": "turn images into a data set that loads fast",
    "pretrain": "train a denoiser to start from",
    "convert": "read published EDM and EDM2 weights",
    "refit": "fit the ratio network of a finished run as a verifier",
    "average": "an average of the weights of any width, after the run",
    "export": "a generator for other programs: torch.export, ONNX, a folder for the Hugging Face Hub",
    "completion": "print a completion script for bash, zsh or fish",
}
"""Name to what it does; the module ``diffratio_fast.NAME`` has ``main(argv)`` and ``parser()``."""


class _Formatter(argparse.HelpFormatter):
    """Appends the default in brackets where there is one; leaves tables (indented lines) as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if "\n  " in text:
            return text
        return super()._fill_text(text, width, indent)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        if (
            default is None
            or isinstance(default, bool)
            or default is argparse.SUPPRESS
            or action.help is None
        ):
            return action.help
        return f"{action.help} [%(default)s]"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr and exit status 2."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", _Formatter)
        kwargs.setdefault("allow_abbrev", False)
        for name in ("prog", "usage", "description", "epilog"):
            if isinstance(kwargs.get(name), str):
                kwargs[name] = kwargs[name].replace(MODULE, program)
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}{self._hint(message)} (see --help)")

    def _hint(self, message: str) -> str:
        """``; did you mean ...?`` for an option that is nearly one of the parser's."""
        what, _, words = message.partition(": ")
        if what != "unrecognized arguments":
            return ""
        option = next((word for word in words.split() if word.startswith("--")), "")
        return did_you_mean(option.partition("=")[0], self._option_string_actions)

    def brief_help(self, names: Collection[str]) -> str:
        """The help text with the options of these destinations alone (and positional arguments)."""
        hidden = [a for a in self._actions if a.option_strings and a.dest not in names]
        kept = [action.help for action in hidden]
        try:
            for action in hidden:
                action.help = argparse.SUPPRESS
            return self.format_help()
        finally:
            for action, text in zip(hidden, kept, strict=True):
                action.help = text


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """``; did you mean X?`` where ``word`` is nearly one of the known words, else nothing."""
    names = list(known)
    close = [n for n in names if word and n.startswith(word)] or difflib.get_close_matches(word, names, 1)
    return f"; did you mean {close[0]}?" if close else ""


LINE_LIMIT = 2000
"""Maximum characters of an error line."""
_NO_MEMORY = re.compile(r"allocate memory|out of memory|not enough memory|storage size calculation", re.I)
"""Patterns of PyTorch's RuntimeErrors for a lack of memory."""


def run(main: Callable[[list[str]], int | None], argv: list[str] | None = None) -> NoReturn:
    """Run ``main(argv)`` as a process: its return value is the exit status, ``UserError`` is 2.

    A lack of memory and unhandled errors of the file system are also one line and status 2.
    """
    try:
        status = main(sys.argv[1:] if argv is None else argv)
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
