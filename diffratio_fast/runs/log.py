"""What a person and a program see of a run while it goes: the progress line and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import struct
import time
from pathlib import Path
from typing import Any

from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, parse_json
from diffratio_fast.storage.writing import replace_file

PLAIN_INTERVAL = 10.0
"""Seconds between lines where output is not a terminal."""


class MetricsLog:
    """metrics.jsonl: a JSON object per line, never a line of a step that was undone."""

    def __init__(self, path: Path, step: int) -> None:
        """Open for appending after ``step``; later lines, of work that a kill undid, are removed."""
        self.path = path
        self.lines: list[dict[str, Any]] = []
        """Everything logged so far, as it would be read back."""
        if path.exists():
            kept = [line for line in path.read_text(errors="replace").splitlines() if _step_of(line) <= step]
            self.lines = [json.loads(line) for line in kept]
            replace_file(path, "".join(line + "\n" for line in kept))
        try:
            self._file = open(path, "a", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from None

    def write(self, values: dict[str, Any]) -> None:
        """Append one line; numbers that are not finite become null, as JSON has no others."""
        clean = {key: _finite(value) for key, value in values.items()}
        self.lines.append(clean)
        try:
            self._file.write(json.dumps(clean) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from None

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a line whose writing has failed
            self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Events:
    """TensorBoard's event file: every number of metrics.jsonl, and the pictures. Imports it when made.

    A continued run writes a new file, whose first event tells TensorBoard to forget what came after ``step``.
    """

    def __init__(self, directory: Path, step: int) -> None:
        try:
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            from tensorboard.compat.proto.summary_pb2 import Summary
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError:
            print("no events for TensorBoard: it is not installed (pip install tensorboard)", flush=True)
            self._writer = None
            return
        self._event, self._summary = Event, Summary
        self._writer = EventFileWriter(str(directory))
        # purging starts at the step itself, so the next one is named
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, values: dict[str, Any]) -> None:
        """A log line's finite numbers; those of a list by their place in it."""
        if self._writer is None:
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
        self._add(self._summary(value=entries), values["step"])

    def picture(self, name: str, png: bytes, step: int) -> None:
        if self._writer is None:
            return
        width, height = struct.unpack(">II", png[16:24])  # of the PNG's header
        image = self._summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        self._add(self._summary(value=[self._summary.Value(tag=name, image=image)]), step)

    def _add(self, summary: Any, step: int) -> None:
        assert self._writer is not None
        self._writer.add_event(self._event(wall_time=time.time(), step=step, summary=summary))
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _step_of(line: str) -> float:
    try:
        return float(parse_json(line)["step"])
    except DAMAGE:
        return math.inf  # a line cut off by a kill
