"""Progress bars of commands; without a terminal, a line every ``PLAIN_INTERVAL`` seconds."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

PLAIN_INTERVAL = 10.0
"""Seconds between lines if stderr is not a terminal."""


class ImageProgress:
    """Context manager: ``update(n)`` counts images of ``total``; ``quiet`` prints nothing."""

    def __init__(self, total: int, what: str, *, quiet: bool = False) -> None:
        self._plain = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="img", desc=what, disable=quiet or self._plain, dynamic_ncols=True)
        self._total, self._what, self._done = total, what, 0
        self._started = self._printed = time.monotonic()

    def update(self, images: int) -> None:
        self._done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._plain and now - self._printed >= PLAIN_INTERVAL:
            self._printed = now
            rate = self._done / (now - self._started)
            print(
                f"{self._what}: {self._done:,} of {self._total:,} images, {rate:,.0f} per second",
                file=sys.stderr,
            )

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


class Progress:
    """Progress of a training run: a bar with rate, time left and metrics, or lines without a terminal.

    ``quiet`` prints nothing; of several processes only rank 0 prints.
    """

    def __init__(self, steps: int, start: int, batch_size: int, *, quiet: bool = False) -> None:
        self.steps, self.batch_size, self.quiet = steps, batch_size, quiet
        self.terminal = sys.stderr.isatty() and not quiet
        self._bar = tqdm(
            total=steps, initial=start, unit="step", dynamic_ncols=True, disable=not self.terminal
        )
        self._start, self._started = start, time.monotonic()
        self._printed = -math.inf

    def advance(self) -> None:
        self._bar.update()

    def metrics(self, values: dict[str, Any], shown: dict[str, str]) -> None:
        """Show the rate of a log line and the metrics ``shown`` (short name to text)."""
        shown = shown | {"img/s": f"{values['images_per_second']:,.0f}"}
        self._bar.set_postfix(shown, refresh=False)
        now = time.monotonic()
        if self.terminal or now - self._printed < PLAIN_INTERVAL:
            return
        self._printed = now
        done = values["step"]
        left = (now - self._started) / max(done - self._start, 1) * (self.steps - done)
        metrics = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.print(f"step {done:>6} of {self.steps}  {metrics}  {left:.0f} s left")

    def print(self, line: str) -> None:
        """Print a line above the bar."""
        if self.quiet:
            return
        if self.terminal:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, flush=True)

    def close(self) -> None:
        self._bar.close()


def format_metric(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
