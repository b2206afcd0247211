"""Writing files so that a reader never sees half of one, whenever the writer is killed."""

from __future__ import annotations

import os
from pathlib import Path

from diffratio_fast.command import UserError


def replace_file(path: Path, content: bytes | str) -> None:
    """Write ``content`` beside ``path``, flush it to disk and rename it over ``path``.

    On failure the old file stays as it was and the error is a ``UserError`` that names the file.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_directory(path.parent)
    except OSError as error:
        if temporary.exists():  # not so where its parent is a file
            temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


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
