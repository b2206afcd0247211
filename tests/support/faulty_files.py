"""File systems that refuse: a real full one, and errors for files whose path contains a word."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    """A real file system of so many bytes; the test is skipped where it cannot be mounted."""
    where.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", where], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a file system")
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; the file that does it."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    return path


class Refusing:
    """While ``number`` is set, opening to write, writing, flushing and removing fail with this errno.

    Only for files whose path contains one of ``words``; ``install`` puts it before the functions of ``os``.
    """

    def __init__(self, *words: str) -> None:
        self.words, self.number, self.refused = words, 0, 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Refusing:
        for name in ("open", "write", "fsync", "replace", "rename", "unlink"):
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        return self

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *arguments: Any, **named: Any) -> Any:
            reading = name == "open" and not (arguments[0] if arguments else 0) & (os.O_WRONLY | os.O_RDWR)
            if self.number and not reading:
                path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
                if any(word in path for word in self.words):
                    self.refused += 1
                    raise OSError(self.number, os.strerror(self.number), path)
            return function(target, *arguments, **named)

        return wrapped
