"""Atomic writing of files, safe against kills and symbolic links.

A file is created exclusively under an unpredictable name in an open directory, flushed to disk and renamed to
its final name. Symbolic links are never followed, neither for the file nor for directories below the one that
the user named.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from diffratio_fast.errors import UserError

_TEMPORARY = re.compile(r"\.(?P<name>.+)\.[0-9a-f]{16}\.tmp")
_LOCK_POLL = 0.1


def replace_file(path: Path, content: bytes | str, *, root: Path | None = None) -> None:
    """Write ``content`` to a temporary file, flush it to disk and rename it to ``path``.

    On failure the old file is unchanged and a ``UserError`` names the file. ``root`` is as in ``replacing``.
    """
    with replacing(path, root=root) as file:
        file.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = True, root: Path | None = None) -> Iterator[BinaryIO]:
    """Yield a writable, seekable file that replaces ``path`` if the ``with`` block ends without an error.

    For content that does not fit in memory. File system errors are those of ``replace_file``. Without
    ``durable`` the file is not flushed to disk: it is complete after a kill, but may be empty after a power
    failure. Directories between ``root`` and the file must not be symbolic links. Without ``root`` the
    directory is one that the user named and may be a link.
    """
    temporary, directory = "", None
    try:
        directory = open_directory(path.parent, root=root, create=True)
        if durable:
            _remove_abandoned(directory, path.name)
        temporary, opened = _created(path.name, directory)
        with os.fdopen(opened, "w+b") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
            os.replace(temporary, path.name, src_dir_fd=directory, dst_dir_fd=directory)
        if durable:
            os.fsync(directory)
    except OSError as error:
        _remove(temporary, directory)
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None
    except BaseException:
        _remove(temporary, directory)
        raise
    finally:
        if directory is not None:
            with contextlib.suppress(OSError):
                os.close(directory)


def _created(target: str, directory: int) -> tuple[str, int]:
    """Name and descriptor of a new file, locked so that ``_remove_abandoned`` skips it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    while True:
        name = f".{target}.{secrets.token_hex(8)}.tmp"
        file = os.open(name, flags, 0o666, dir_fd=directory)
        with contextlib.suppress(OSError):  # no locks on this file system, or a concurrent removal
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(file).st_nlink:
            return name, file
        os.close(file)


def _remove(name: str, directory: int | None) -> None:
    """Remove a file and ignore errors: they would hide the original error."""
    if directory is not None and name:
        with contextlib.suppress(OSError):
            os.unlink(name, dir_fd=directory)


def _remove_abandoned(directory: int, target: str | None = None) -> None:
    """Remove temporary files (of ``target``) of killed writers: those that no process has locked."""
    with contextlib.suppress(OSError):
        for name in os.listdir(directory):
            match = _TEMPORARY.fullmatch(name)
            if match is None or target not in (None, match["name"]):
                continue
            with contextlib.suppress(OSError):
                file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(name, dir_fd=directory)
                finally:
                    os.close(file)


def remove_abandoned(directory: Path) -> None:
    """Remove incomplete files of killed processes from a directory; ignore errors."""
    with contextlib.suppress(OSError):
        opened = open_directory(directory)
        try:
            _remove_abandoned(opened)
        finally:
            os.close(opened)


def open_directory(path: Path, *, root: Path | None = None, create: bool = False) -> int:
    """Open a directory descriptor; ``OSError`` if a component below ``root`` is a symbolic link."""
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if create:
        (root or path).mkdir(parents=True, exist_ok=True)
    opened = os.open(root or path, flags)
    try:
        for part in path.relative_to(root).parts if root is not None else ():
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(part, dir_fd=opened)
            try:
                below = os.open(part, flags | os.O_NOFOLLOW, dir_fd=opened)
            except OSError as error:
                if stat.S_ISLNK(os.stat(part, dir_fd=opened, follow_symlinks=False).st_mode):
                    raise OSError(errno.ELOOP, f"{part} is a symbolic link; refused") from None
                raise error
            os.close(opened)
            opened = below
    except BaseException:
        os.close(opened)
        raise
    return opened


def open_in_place(path: Path, flags: int) -> int:
    """Open a regular file (created if missing) without following a link and without blocking."""
    try:
        file = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a symbolic link; refused", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return file


def sync_directory(path: Path) -> None:
    """Flush the entries of a directory to disk, so that a rename survives a power failure."""
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def make_directory(path: Path, *, root: Path | None = None) -> None:
    """Create a directory and check that it is writable; raise ``UserError`` on failure.

    ``root`` is as in ``replacing``.
    """
    try:
        os.close(open_directory(path, root=root, create=True))
    except OSError as error:
        raise UserError(f"cannot create {path}: {error.strerror or error}") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise UserError(f"cannot write in {path}: permission denied")


@contextlib.contextmanager
def lock(path: Path, *, wait: bool | float = False) -> Iterator[bool]:
    """Lock the file ``path`` until the block or the process ends; yield False if another process holds it.

    ``wait`` is True, or the maximum seconds to wait. Raises ``OSError`` if ``path`` is a link or a device.
    """
    file = open_in_place(path, os.O_RDWR)
    try:
        yield _locked(file, wait)
    finally:
        with contextlib.suppress(OSError):  # for example a file server that is gone
            os.close(file)


def _locked(file: int, wait: bool | float) -> bool:
    if wait is True:
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_LOCK_POLL)


def remove_file(path: Path) -> None:
    """Remove a file if it exists; raise ``UserError`` on failure."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot remove {path}: {error.strerror or error}") from None


def sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while content := stream.read(8 << 20):
            digest.update(content)
    return digest.hexdigest()
