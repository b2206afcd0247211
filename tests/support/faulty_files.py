"""File systems that fail: a full one, and errors for files whose path contains a word."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Iterator[Path]:
    """A real file system of the given size in bytes; the test is skipped if it cannot be mounted."""
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
    """Fill a disk completely; return the file that fills it."""
    path = disk / "filler"
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    return path


class Refusing:
    """While ``number`` is set, operations on files whose path contains one of ``words`` fail with this errno.

    The operations are opening to write, writing, flushing, renaming and removing, or with ``reading`` opening
    to read and reading; ENOMEM is a ``MemoryError``. ``install`` wraps the functions of ``os`` and ``open``.
    """

    WRITING = ("open", "write", "fsync", "replace", "rename", "unlink")
    READING = ("open", "read", "pread", "preadv")

    def __init__(self, *words: str, reading: bool = False) -> None:
        self.words, self.number, self.refused, self.reading = words, 0, 0, reading

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Refusing:
        for name in self.READING if self.reading else self.WRITING:
            monkeypatch.setattr(os, name, self._wrap(name, getattr(os, name)))
        opened = io.open
        for module in (io, builtins):
            monkeypatch.setattr(module, "open", self._wrap_open(opened))
        return self

    def _check(self, target: Any) -> None:
        if not self.number:
            return
        try:
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
        except OSError:
            return
        if any(word in path for word in self.words):
            self.refused += 1
            if self.number == errno.ENOMEM:
                raise MemoryError
            raise OSError(self.number, os.strerror(self.number), path)

    def _wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, *arguments: Any, **named: Any) -> Any:
            flags = arguments[0] if name == "open" and arguments else 0
            writes = name != "open" or bool(flags & (os.O_WRONLY | os.O_RDWR))
            if self.reading or writes:
                path = target
                directory = named.get("dir_fd", named.get("src_dir_fd"))
                if isinstance(directory, int) and isinstance(target, str):
                    path = f"{os.readlink(f'/proc/self/fd/{directory}')}/{target}"
                self._check(path)
            return function(target, *arguments, **named)

        return wrapped

    def _wrap_open(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(target: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            if self.reading or set(mode) & set("wax+"):
                self._check(target)
            return function(target, mode, *arguments, **named)

        return wrapped
