"""Writing files so that a reader never sees half of one, whenever the writer is killed."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffratio_fast.errors import UserError


def replace_file(path: Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, flush it to disk and rename it over ``path``.

    On failure the old file stays as it was and the error is a ``UserError`` that names the file.
    """
    with replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """A file, writable and seekable, that replaces ``path`` when the block ends without an error.

    For content too large to hold; failures of the file system are those of ``replace_file``. What is not
    ``durable`` is not flushed to disk: whole after a kill, but after a power cut perhaps an empty file.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            sync_directory(path.parent)
    except OSError as error:
        if temporary.exists():  # not so where its parent is a file
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to disk, so that a rename in it outlives a power cut."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_directory(path: Path) -> None:
    """Create a directory and see that files can be written in it; else a ``UserError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write in {path}: permission denied")


@contextlib.contextmanager
def lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold the lock file ``path``, which dies with its process; yields False where another holds it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while content := stream.read(8 << 20):
            digest.update(content)
    return digest.hexdigest()
