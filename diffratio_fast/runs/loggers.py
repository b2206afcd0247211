"""Loggers of metrics besides metrics.jsonl: TensorBoard, Weights & Biases, a CSV file (``--logger``).

Loggers are derived output: a logger that cannot start, or fails, is reported once and skipped; the run
continues.
"""

from __future__ import annotations

import contextlib
import csv
import io
import math
import os
import secrets
import socket
import struct
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from diffratio_fast.errors import UserError
from diffratio_fast.runs.derived import Derived
from diffratio_fast.storage.reading import open_regular
from diffratio_fast.storage.writing import open_in_place, replace_file

Scalars = dict[str, float]
Say = Callable[[str], None]
Levels = Mapping[str, list[float]]
"""Noise levels by the name of their log field: ``sigma`` and ``generator_sigma``."""

GROUPS = {
    "loss": ("loss", "error", "ratio_loss", "student_loss", "validation_error"),
    "ratio": ("ratio_accuracy", "log_ratio_real", "log_ratio_fake", "clamped_fraction"),
    "quality": ("frechet_distance_validation", "class_accuracy"),
    "optimization": ("gradient_norm", "generator_lr", "ratio_lr", "lr", "bad_steps", "skipped_updates"),
    "speed": (
        "images_per_second", "loader_share", "memory_bytes", "seconds", "evaluation_seconds",
        "evaluation_images", "images",
    ),
}  # fmt: skip
_GROUP_OF = {name: group for group, names in GROUPS.items() for name in names}
GENERATOR_FIELDS = ("log_ratio_gradient_by_sigma", "generator_gradient_share")
"""Lists over the noise levels of the generator; other lists are over those of the ratio network."""


class Logger(Protocol):
    """Logs the numbers of a log line and the sample grids at ``step``."""

    def scalars(self, values: Scalars, step: int) -> None: ...

    def picture(self, name: str, png: bytes, step: int) -> None: ...

    def close(self) -> None: ...


def named_scalars(values: Mapping[str, Any], levels: Levels) -> Scalars:
    """The finite numbers of a log line under grouped names.

    A list over noise levels gets one name per sigma: ``divergence_by_sigma/sigma 0.040``.
    """
    levels = {**levels, **{name: values[name] for name in ("sigma", "generator_sigma") if values.get(name)}}
    found: Scalars = {}
    for name, value in values.items():
        if name in ("step", "sigma", "generator_sigma"):
            continue
        if isinstance(value, list):
            known = levels.get("generator_sigma" if name in GENERATOR_FIELDS else "sigma", [])
            for number, item in enumerate(value):
                label = f"sigma {known[number]:.3g}" if len(known) == len(value) else str(number)
                _keep(found, f"{name}/{label}", item)
        else:
            _keep(found, f"{_group(name)}/{name}", value)
    return found


def _group(name: str) -> str:
    return _GROUP_OF.get(name, "divergence" if name.startswith("divergence") else "other")


def _keep(found: Scalars, name: str, value: Any) -> None:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        found[name] = float(value)


PENDING_LIMIT = 64 << 20
"""Maximum bytes of a log kept in memory while writing fails; later bytes are lost."""


class _File:
    """An append-only file; bytes that cannot be written are kept and written later."""

    def __init__(self, path: Path, what: str, say: Say) -> None:
        self._path, self._what, self._derived = path, what, Derived(say)
        self._file: int | None = None
        self._pending = bytearray()

    def write(self, content: bytes) -> None:
        """Keep bytes until ``flush``."""
        if len(self._pending) + len(content) <= PENDING_LIMIT:
            self._pending += content

    def flush(self) -> None:
        self._derived.attempt(self._what, self._flush)

    def _flush(self) -> None:
        if self._file is None:
            self._file = open_in_place(self._path, os.O_WRONLY | os.O_APPEND)
        while self._pending:  # keep the unwritten rest of a record
            del self._pending[: os.write(self._file, self._pending)]

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(OSError):
                os.close(self._file)
            self._file = None


class TensorBoard:
    """An event file, with the sample grids.

    A resumed run writes a new file; its first event makes TensorBoard discard events after ``step``. Records
    are written here because the writer of TensorBoard has a thread that fails at the first file system error
    and then stops the process.
    """

    def __init__(self, root: Path, step: int, config: Mapping[str, Any], say: Say) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        # TensorBoard reads files in the order of their names; nanoseconds order the files of one second
        now = time.time_ns()
        place = f"{socket.gethostname()}.{now % 10**9:09d}.{secrets.token_hex(4)}"
        name = f"events.out.tfevents.{now // 10**9:010d}.{place}"
        self._file = _File(root / name, "TensorBoard's events", say)
        self._records = RecordWriter(self._file)
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # events from the step of START on are purged, so use the next step
        start = SessionLog(status=SessionLog.START)
        self._add(Event(wall_time=time.time(), step=step + 1, session_log=start))

    def scalars(self, values: Scalars, step: int) -> None:
        entries = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._add_summary(self._summary(value=entries), step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        width, height = struct.unpack(">II", png[16:24])  # of the PNG's header
        image = self._summary.Image(encoded_image_string=png, width=width, height=height, colorspace=3)
        self._add_summary(self._summary(value=[self._summary.Value(tag=name, image=image)]), step)

    def _add_summary(self, summary: Any, step: int) -> None:
        self._add(self._event(wall_time=time.time(), step=step, summary=summary))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


CSV_FILE = "metrics.csv"
CSV_COLUMNS = ("step", "name", "value")


class CsvFile:
    """``metrics.csv``: a row (step, name, value) for each number, for spreadsheets and pandas."""

    def __init__(self, root: Path, step: int, config: Mapping[str, Any], say: Say) -> None:
        path = root / CSV_FILE
        rows: list[list[str]] = []
        if path.exists():  # drop rows of lost steps and a truncated row
            with io.TextIOWrapper(open_regular(path), newline="") as file:
                rows = [row for row in list(csv.reader(file))[1:] if _is_row(row) and int(row[0]) <= step]
        replace_file(path, "".join(",".join(row) + "\n" for row in (list(CSV_COLUMNS), *rows)))
        self._file = _File(path, CSV_FILE, say)

    def scalars(self, values: Scalars, step: int) -> None:
        self._file.write("".join(f"{step},{name},{value!r}\n" for name, value in values.items()).encode())
        self._file.flush()

    def picture(self, name: str, png: bytes, step: int) -> None:
        pass

    def close(self) -> None:
        self._file.close()


def _is_row(row: list[str]) -> bool:
    return len(row) == len(CSV_COLUMNS) and row[0].isdecimal()


WANDB_ID = "wandb-id.txt"


class WeightsAndBiases:
    """A run of Weights & Biases; a resumed run continues it. Extra ``[wandb]``.

    The environment variables of wandb set project, entity, offline mode and key.
    """

    def __init__(self, root: Path, step: int, config: Mapping[str, Any], say: Say) -> None:
        import wandb

        kept = root / WANDB_ID
        if not kept.exists():
            replace_file(kept, uuid.uuid4().hex[:16])
        self._wandb = wandb
        self._run = wandb.init(
            dir=str(root), id=kept.read_text().strip(), name=root.name, config=dict(config), resume="allow"
        )

    def scalars(self, values: Scalars, step: int) -> None:
        self._run.log(values, step=step)

    def picture(self, name: str, png: bytes, step: int) -> None:
        from PIL import Image

        self._run.log({name: self._wandb.Image(Image.open(io.BytesIO(png)))}, step=step)

    def close(self) -> None:
        self._run.finish()


LOGGERS: dict[str, Callable[[Path, int, Mapping[str, Any], Say], Logger]] = {
    "tensorboard": TensorBoard,
    "csv": CsvFile,
    "wandb": WeightsAndBiases,
}
"""Loggers by ``--logger`` name. Arguments: run directory, first step, options, function that prints."""


def parse_loggers(text: str) -> list[str]:
    """The names in ``--logger``: a comma-separated list of names from ``LOGGERS``; may be empty."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if words == ["none"]:
        return []
    if unknown := [word for word in words if word not in LOGGERS]:
        raise UserError(f"--logger {text}: no such logger: {unknown[0]}; known: {', '.join(LOGGERS)}, none")
    return list(dict.fromkeys(words))


class Loggers:
    """All loggers of a run; a logger that fails is reported once with ``say`` and then skipped."""

    def __init__(
        self,
        names: list[str],
        root: Path,
        step: int,
        *,
        config: Mapping[str, Any],
        levels: Levels,
        say: Callable[[str], None],
    ) -> None:
        self._say, self._levels = say, levels
        self._loggers: dict[str, Logger] = {}
        for name in names:
            try:
                self._loggers[name] = LOGGERS[name](root, step, config, say)
            except ImportError:
                say(f"warning: no log for {name}: it is not installed (pip install {name})")
            except Exception as error:  # an error of a logger must not stop the run
                say(f"warning: no log for {name}: {_text(error)}")

    def line(self, values: Mapping[str, Any]) -> None:
        """Log a line of metrics.jsonl."""
        named = named_scalars(values, self._levels)
        self._each(lambda logger: logger.scalars(named, values["step"]))

    def picture(self, name: str, png: bytes, step: int) -> None:
        self._each(lambda logger: logger.picture(name, png, step))

    def _each(self, act: Callable[[Logger], None]) -> None:
        for name, logger in list(self._loggers.items()):
            try:
                act(logger)
            except Exception as error:  # as above
                self._say(f"warning: the log for {name} ends here: {_text(error)}")
                del self._loggers[name]

    def close(self) -> None:
        for logger in self._loggers.values():
            with contextlib.suppress(Exception):
                logger.close()


def _text(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
