"""A soak test: a run is interrupted and resumed repeatedly; memory must stay flat and nothing may leak.

    python -m benchmarks.soak --minutes 10 [--preset digits|tiny-unet|both] [--json FILE]

Each session resumes a run in this process: it reopens the prepared data, trains with a checkpoint every few
steps, and is interrupted by SIGTERM after some seconds. After each session the resident memory, open files,
threads and child processes are counted (Linux: from /proc). The first sessions, in which libraries fill their
caches, are the warm-up. Fails if more files, threads or children exist at the end than after the warm-up, or
if memory has grown.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import io
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment
from diffratio_fast import command

SESSION_SECONDS = 10.0
GROWTH = 24 * 2**20
"""Allowed growth in bytes of the median resident memory from the first to the last third after warm-up."""
UNET = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
PRESETS: dict[str, dict[str, Any]] = {
    "digits": {},
    "tiny-unet": {
        "generator": "backbone", "ratio_network": "encoder", "backbone_options": json.dumps(UNET),
        "batch_size": 16,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Count:
    """Resources of the process at one time."""

    seconds: float
    resident_bytes: int
    files: int
    threads: int
    children: int


def count(began: float) -> Count:
    """Count the resources of this process, after garbage collection and trimming of free memory."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    children = sum(len(path.read_text().split()) for path in Path("/proc/self/task").glob("*/children"))
    return Count(
        time.monotonic() - began, int(status["VmRSS"].split()[0]) * 1024, len(os.listdir("/proc/self/fd")),
        int(status["Threads"]), children,
    )  # fmt: skip


def prepared_digits(root: Path) -> Path:
    """Prepare the digits as shards, so that the loader's threads read them."""
    from PIL import Image

    from diffratio_fast import prepare
    from diffratio_fast.data import digits

    for split, (records, labels) in digits.load().splits.items():
        for number, (record, label) in enumerate(zip(records, labels, strict=True)):
            folder = root / "images" / split / str(int(label))
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((record[0] * 15).numpy(), "L").save(folder / f"{number:04d}.png")
    with contextlib.redirect_stdout(io.StringIO()):
        prepare.main([str(root / "images"), str(root / "data"), "--channels", "1", "--workers", "1"])
    return root / "data"


@contextlib.contextmanager
def stopped_every(seconds: float) -> Iterator[None]:
    """Send SIGTERM to this process every ``seconds`` seconds, like a preemption."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: None)  # ignore signals outside training
    ended = threading.Event()

    def send() -> None:
        while not ended.wait(seconds):
            os.kill(os.getpid(), signal.SIGTERM)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()
        signal.signal(signal.SIGTERM, before)


def session(preset: str, data: Path, run_dir: Path, seconds: float) -> int:
    """Resume the run for ``seconds`` and return its step."""
    from diffratio_fast.config.presets import PRESETS as TRAINED
    from diffratio_fast.config.train import TrainConfig
    from diffratio_fast.training.generator_run import train

    often = {
        "steps": 10**7, "log_every": 20, "checkpoint_every": 50, "eval_every": 200, "snapshot_every": 10**6,
        "refit_steps": 20, "threads": 1, "device": "cpu", "verify": "always",
    }  # fmt: skip
    config = TrainConfig(
        **TRAINED["digits"] | PRESETS[preset] | often | {"data": str(data), "run_dir": str(run_dir)}
    )
    from diffratio_fast.errors import Interrupted

    with (
        stopped_every(seconds),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(Interrupted),
    ):
        train("digits", config)
    metrics = run_dir / "metrics.jsonl"  # written with the first line
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    for path in (*(run_dir / "samples").glob("*.png"), *run_dir.glob("events.*")):
        path.unlink()  # files that accumulate by design
    return int(json.loads(lines[-1])["step"]) if lines else 0


def soak(seconds: float, presets: list[str], *, session_seconds: float = SESSION_SECONDS) -> dict[str, Any]:
    """Run sessions of the presets alternately for ``seconds``, at least nine; return the counts."""
    began = time.monotonic()
    counts: list[Count] = []
    steps = dict.fromkeys(presets, 0)
    with tempfile.TemporaryDirectory() as folder:
        data = prepared_digits(Path(folder))
        while time.monotonic() - began < seconds or len(counts) < 9:
            preset = presets[len(counts) % len(presets)]
            steps[preset] = session(preset, data, Path(folder) / preset, session_seconds)
            counts.append(count(began))
    warm = len(counts) // 4
    after = counts[warm:]
    third = max(1, len(after) // 3)
    early = statistics.median(c.resident_bytes for c in after[:third])
    late = statistics.median(c.resident_bytes for c in after[-third:])
    slope = statistics.linear_regression(
        [c.seconds for c in after], [float(c.resident_bytes) for c in after]
    ).slope
    left = {
        name: getattr(after[-1], name) - max(getattr(c, name) for c in after[:third])
        for name in ("files", "threads", "children")
    }
    return {
        "environment": environment(torch.device("cpu")),
        "presets": presets,
        "seconds": time.monotonic() - began,
        "sessions": len(counts),
        "warmup_sessions": warm,
        "steps": steps,
        "resident_early_bytes": early,
        "resident_late_bytes": late,
        "resident_slope_bytes_per_minute": slope * 60,
        "left_open": left,
        "flat": late - early < GROWTH and max(left.values()) <= 0,
        "counts": [asdict(c) for c in counts],
    }


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.soak", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, metavar="X", help="approximate duration")
    parser.add_argument("--preset", default="both", choices=(*PRESETS, "both"), help="presets to train")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result to this file")
    arguments = parser.parse_args(argv)
    if not arguments.minutes > 0:
        raise command.UserError(f"--minutes {arguments.minutes}: out of range; expected above 0")
    presets = list(PRESETS) if arguments.preset == "both" else [arguments.preset]
    result = soak(arguments.minutes * 60, presets)
    if arguments.json is not None:
        from diffratio_fast.storage.writing import replace_file

        replace_file(arguments.json, json.dumps(result, indent=1) + "\n")
    early, late = (result[name] / 2**20 for name in ("resident_early_bytes", "resident_late_bytes"))
    slope = result["resident_slope_bytes_per_minute"] / 2**20
    print(
        f"{result['sessions']} sessions, steps {result['steps']}; resident memory {early:.0f} MiB after the "
        f"warm-up, {late:.0f} at the end ({slope:+.2f} a minute); left open: {result['left_open']}; "
        f"{'flat' if result['flat'] else 'NOT FLAT'}"
    )
    return 0 if result["flat"] else 1


if __name__ == "__main__":
    if "MALLOC_ARENA_MAX" not in os.environ:
        # glibc creates up to 8 arenas per core for short-lived threads; their growth would look like a leak
        arguments = [sys.executable, "-m", "benchmarks.soak", *sys.argv[1:]]
        os.execve(sys.executable, arguments, os.environ | {"MALLOC_ARENA_MAX": "2"})
    command.run(main)
