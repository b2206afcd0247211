"""Reading untrusted files: plain data only, of bounded size and depth. No code is run.

An invalid file raises one of ``DAMAGE``; the caller reports it in one line.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import json
import lzma
import math
import os
import stat
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import yaml

DAMAGE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, EOFError,
    RecursionError, MemoryError, NotImplementedError, SyntaxError, struct.error, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, lzma.LZMAError, tokenize.TokenError,
)  # fmt: skip
"""Errors that Python's readers raise for a damaged or malicious file."""

TEXT_LIMIT = 1 << 20
"""Maximum bytes of an options file."""
UNPACKED_LIMIT = 1 << 31
"""Default of --max-bytes: maximum bytes of a decompressed file in memory."""
JSON_ITEMS = 50_000_000
"""Maximum values of a JSON text: each takes up to a hundred bytes of memory."""
ALWAYS = 4096
"""A number in the arguments of a network that is allowed for any file size."""


def one_line(error: object) -> str:
    """Return a text, such as that of an error, as a part of a one-line message."""
    text = " ".join(str(error)[:10_000].split())[:400]
    if isinstance(error, KeyError):
        return f"{text} is missing"
    if isinstance(error, MemoryError):
        return "out of memory"
    return "nested too deeply" if isinstance(error, RecursionError) else text or type(error).__name__


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """Open a regular file for reading; ``OSError`` for anything else, such as a FIFO, which would block."""
    opened = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    kind = os.fstat(opened).st_mode
    if not stat.S_ISREG(kind):
        os.close(opened)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(opened, "rb")


def require_regular(path: str | os.PathLike[str]) -> None:
    """Raise ``OSError`` unless ``path`` is a regular file; for readers that open it themselves."""
    open_regular(path).close()


def read_bytes(path: str | os.PathLike[str], limit: int | None = None) -> bytes:
    """The content of a regular file; ``ValueError`` if it is longer than ``limit`` bytes."""
    with open_regular(path) as file:
        content = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(content) > limit:
        raise ValueError(f"longer than {limit} bytes")
    return content


def read_text(path: str | os.PathLike[str]) -> str:
    """The content of a regular file as UTF-8; invalid bytes are replaced."""
    return read_bytes(path).decode(errors="replace")


class Limited(io.RawIOBase):
    """A stream that raises ``ValueError`` after ``limit`` bytes, for example of a compressed file."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream, self._limit, self._left = stream, limit, limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        content = self._stream.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise ValueError(f"unpacks to more than {self._limit} bytes (--max-bytes)")
        return content

    def close(self) -> None:
        self._stream.close()
        super().close()


def open_packed(path: Path, limit: int) -> IO[bytes]:
    """Open a regular file; gzip, bzip2 and xz are decompressed, to at most ``limit`` bytes."""
    file = open_regular(path)
    magic = file.read(6)
    file.seek(0)
    forms: dict[bytes, Callable[[Any], Any]] = {
        b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open
    }  # fmt: skip
    unpack = next((form for start, form in forms.items() if magic.startswith(start)), lambda stream: stream)
    return Limited(unpack(file), limit)  # type: ignore[return-value]


def parse_json(text: str | bytes) -> Any:
    """Parse a JSON text; ``ValueError`` if it is invalid, too large or nested too deeply."""
    marks: Any = (b",", b"[", b"{") if isinstance(text, bytes) else (",", "[", "{")
    if sum(text.count(mark) for mark in marks) > JSON_ITEMS:
        raise ValueError(f"more than {JSON_ITEMS} values")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _PlainLoader(yaml.SafeLoader):
    """Loads plain data without anchors: nested references can expand to any size."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("references (*name) are not read")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file; ``OSError``, or ``ValueError`` if it is invalid or too large."""
    content = read_bytes(path, TEXT_LIMIT)
    try:
        return yaml.load(content, _PlainLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, *DAMAGE) as error:  # for example ValueError for an invalid date
        raise ValueError(one_line(error)) from None


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """(shape, dtype, in Fortran order) of a ``.npy`` stream; leaves the stream at the data.

    Raises ``ValueError`` for anything but an array of numbers or text: Python objects are not read.
    """
    version = np.lib.format.read_magic(file)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in read:
        raise ValueError(f".npy version {version}")
    try:
        shape, fortran, dtype = read[version](file)
    except (RecursionError, MemoryError, SyntaxError, TypeError, tokenize.TokenError):
        raise ValueError("a header that is no array's") from None
    if min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape}")
    if dtype.hasobject:
        raise ValueError("arrays of Python objects are not read")
    return shape, dtype, fortran


def read_npz(
    path: Path, names: set[str] | None = None, *, limit: int = UNPACKED_LIMIT
) -> dict[str, np.ndarray]:
    """The arrays ``names`` (default: all) of an ``.npz``; each is at most as large as its header states.

    Raises ``ValueError`` before reading if they have more than ``limit`` bytes in total.
    """
    found = {}
    with open_regular(path) as file, zipfile.ZipFile(file) as archive:
        members = {
            info.filename.removesuffix(".npy"): info
            for info in archive.infolist()
            if names is None or info.filename.removesuffix(".npy") in names
        }
        if (total := sum(info.file_size for info in members.values())) > limit:
            raise ValueError(f"its arrays take {total} bytes, more than {limit} (--max-bytes)")
        for name, info in members.items():
            with archive.open(info) as member:
                shape, dtype, fortran = array_header(member)
                size = math.prod(shape) * dtype.itemsize
                if not size <= info.file_size:
                    raise ValueError(f"{name} claims {size} bytes")
                content = member.read(size + 1)
            if len(content) != size:
                raise ValueError(f"the size of {name} does not match its header")
            found[name] = np.ndarray(shape, dtype, bytearray(content), order="F" if fortran else "C")
    return found


def check_ambition(arguments: Any, numbers: int) -> None:
    """Raise ``ValueError`` if the arguments of a network are too large for a file of so many numbers."""
    if _largest(arguments) > max(numbers, ALWAYS):
        raise ValueError(f"its arguments ask for more than the {numbers} numbers that it holds")


def _largest(content: Any) -> float:
    if isinstance(content, dict):
        return max((_largest(value) for value in content.values()), default=0)
    if isinstance(content, (list, tuple)):
        return max((_largest(value) for value in content), default=0)
    return abs(content) if isinstance(content, (int, float)) else 0
