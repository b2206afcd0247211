"""What a person and a program see of a run while it goes: the progress line and metrics.jsonl."""

from __future__ import annotations

import contextlib
import json
import math
import resource
import struct
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from diffratio_fast.command import UserError
from diffratio_fast.files import replace_file
from diffratio_fast.untrusted import DAMAGE, parse_json

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


class Progress:
    """A bar with rate, time left and the divergence on a terminal; a line now and then elsewhere.

    A ``quiet`` one says nothing: of several processes one speaks.
    """

    def __init__(self, steps: int, start: int, batch_size: int, *, quiet: bool = False) -> None:
        self.steps, self.batch_size, self.quiet = steps, batch_size, quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.terminal
        )
        self._start, self._started = start, time.monotonic()
        self._said = -math.inf

    def advance(self) -> None:
        self._bar.update()

    def metrics(self, values: dict[str, Any], shown: dict[str, str]) -> None:
        """Show the figures ``shown`` of a log line, by short names, and its rate."""
        shown = shown | {"img/s": f"{values['images_per_second']:,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        if self.terminal or now - self._said < PLAIN_INTERVAL:
            return
        self._said = now
        done = values["step"]
        left = (now - self._started) / max(done - self._start, 1) * (self.steps - done)
        figures = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.say(f"step {done:>6} of {self.steps}  {figures}  {left:.0f} s left")

    def say(self, line: str) -> None:
        """Print a line of its own, above the bar."""
        if self.quiet:
            return
        if self.terminal:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()


def figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: of the device where it is a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
