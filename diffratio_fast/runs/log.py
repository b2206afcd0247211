"""metrics.jsonl: the metrics of a run, one JSON object per line.

It is derived output: training continues after a file system error. Lines that could not be written are kept
in memory and written when writing works again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffratio_fast.runs.derived import Derived
from diffratio_fast.storage.reading import DAMAGE, parse_json, read_text
from diffratio_fast.storage.writing import open_in_place, replace_file


class MetricsLog:
    """metrics.jsonl: one JSON object per line, without lines of steps after the resumed checkpoint."""

    def __init__(self, path: Path, step: int, say: Callable[[str], None] = print) -> None:
        """Open for appending after ``step``; remove later lines, which belong to lost steps."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        """All lines so far, as read back from the file."""
        self._derived = Derived(say)
        self._file: int | None = None
        self._complete = True  # whether the file, if any, contains ``lines``; otherwise it is rewritten
        self._read_back = True  # False: ``lines`` is incomplete, so the file is only appended to
        if path.is_symlink() or path.exists():
            self._read_back = self._derived.attempt("metrics.jsonl", lambda: self._read(step))
            self._complete = not self._read_back
            self._rewrite()

    def _read(self, step: int) -> None:
        kept = [line for line in read_text(self.path).splitlines() if _step_of(line) <= step]
        self.lines = [json.loads(line) for line in kept]

    def _rewrite(self) -> None:
        if not self._complete:
            self._derived.attempt("metrics.jsonl", self._write_all)

    def _write_all(self) -> None:
        replace_file(self.path, "".join(json.dumps(line) + "\n" for line in self.lines))
        self._complete = True

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null, as JSON requires."""
        clean = {key: _finite(value) for key, value in values.items()}
        self.lines.append(clean)
        if not self._derived.attempt("metrics.jsonl", lambda: self._append(clean)):
            self._close_file()
            self._complete = not self._read_back

    def _append(self, line: dict[str, Any]) -> None:
        if not self._complete:
            self._write_all()
            return
        if self._file is None:
            self._file = open_in_place(self.path, os.O_WRONLY | os.O_APPEND)
        content = json.dumps(line).encode() + b"\n"
        if os.write(self._file, content) != len(content):
            raise OSError("only a part of a line could be written")

    def close(self) -> None:
        self._rewrite()
        self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except DAMAGE:
        return math.inf  # a line truncated by a kill
