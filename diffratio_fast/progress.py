"""Progress of commands that count images: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from tqdm import tqdm

PLAIN_INTERVAL = 10.0
"""Seconds between lines where stderr is not a terminal."""


class ImageProgress:
    """``update(n)`` counts images of ``total``; says nothing where ``quiet``. A context manager."""

    def __init__(self, total: int, what: str, *, quiet: bool = False) -> None:
        self._plain = not quiet and not sys.stderr.isatty()
        self._bar = tqdm(total=total, unit="img", desc=what, disable=quiet or self._plain, dynamic_ncols=True)
        self._total, self._what, self._done = total, what, 0
        self._started = self._said = time.monotonic()

    def update(self, images: int) -> None:
        self._done += images
        self._bar.update(images)
        now = time.monotonic()
        if self._plain and now - self._said >= PLAIN_INTERVAL:
            self._said = now
            rate = self._done / (now - self._started)
            print(
                f"{self._what}: {self._done:,} of {self._total:,} images, {rate:,.0f} a second",
                file=sys.stderr,
            )

    def __enter__(self) -> ImageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.close()


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
