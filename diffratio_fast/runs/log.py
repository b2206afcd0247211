"""What a program sees of a run while it goes: metrics.jsonl and TensorBoard's events.

Both are derived output: where the file system refuses them, training goes on. What could not be written is
kept in memory and written once that works again.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffratio_fast.runs.derived import Derived
from diffratio_fast.storage.reading import DAMAGE, parse_json, read_text
from diffratio_fast.storage.writing import open_in_place, replace_file

EVENTS_LIMIT = 1 << 26
"""Bytes of events kept in memory while they cannot be written, at most; later ones are dropped."""


class MetricsLog:
    """metrics.jsonl: one JSON object per line, without lines of steps after the resumed checkpoint."""

    def __init__(self, path: Path, step: int, say: Callable[[str], None] = print) -> None:
        """Open for appending after ``step``; later lines, of lost steps, are removed."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        """All lines so far, as read back from the file."""
        self._derived = Derived(say)
        self._file: int | None = None
        self._complete = True  # whether the file, if any, holds ``lines``: else it is written anew
        self._read_back = True  # else ``lines`` is not all of it, and it is only appended to
        if path.is_symlink() or path.exists():
            self._read_back = self._derived.attempt("metrics.jsonl", lambda: self._read(step))
            self._complete = not self._read_back
            self._rewrite()

    def _read(self, step: int) -> None:
        kept = [line for line in read_text(self.path).splitlines() if _step_of(line) <= step]
        self.lines = [json.loads(line) for line in kept]

    def _rewrite(self) -> None:
        if not self._complete:
            self._derived.attempt("metrics.jsonl", self._write_anew)

    def _write_anew(self) -> None:
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
            self._write_anew()
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


class Events:
    """TensorBoard's event file: every number of metrics.jsonl, and the pictures.

    A continued run writes a new file, whose first event tells TensorBoard to forget what came after ``step``.
    The file is written here, record by record: TensorBoard's own writer has a thread that ends with the first
    error of the file system, and the process with it.
    """

    def __init__(self, directory: Path, step: int, say: Callable[[str], None] = print) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.record_writer import RecordWriter
        except ImportError:
            print("TensorBoard is not installed: no events are written (pip install tensorboard)", flush=True)
            self._event = None
            return
        self._event, self._summary, self._derived = Event, Summary, Derived(say)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{secrets.token_hex(8)}"
        self._path = directory / name
        self._file: int | None = None
        self._pending = bytearray()
        self._records = RecordWriter(self)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # TensorBoard purges from the named step on, so name the next one
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, values: dict[str, Any]) -> None:
        """Write the finite numbers of a log line; list elements are named by index."""
        if self._event is None:
            return
        flat: dict[str, Any] = {}
        for name, value in values.items():
            flat |= (
                {f"{name}/{i}": v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
            )
        entries = [
            self._summary.Value(tag=name, simple_value=value)
            for name, value in flat.items()
            if isinstance(value, (int, float)) and name != "step" and math.isfinite(value)
        ]
        self._add_summary(self._summary(value=entries), values["step"])

    def picture(self, name: str, png: bytes, step: int) -> None:
        if self._event is None:
            return
        width, height = struct.unpack(">II", png[16:24])  # in the PNG header
        image = self._summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        self._add_summary(self._summary(value=[self._summary.Value(tag=name, image=image)]), step)

    def _add_summary(self, summary: Any, step: int) -> None:
        assert self._event is not None
        self._add(self._event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._derived.attempt("TensorBoard's events", self._flush)

    def write(self, record: bytes) -> None:
        """Keep a record until ``_flush``; called by TensorBoard's ``RecordWriter``."""
        if len(self._pending) + len(record) <= EVENTS_LIMIT:
            self._pending += record

    def _flush(self) -> None:
        if self._file is None:
            self._file = open_in_place(self._path, os.O_WRONLY | os.O_APPEND)
        while self._pending:  # a part of a record stays, to be completed
            del self._pending[: os.write(self._file, self._pending)]

    def close(self) -> None:
        if self._event is not None and self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except DAMAGE:
        return math.inf  # a line truncated by a kill
