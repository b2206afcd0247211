"""Progress of commands that count images: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time

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
