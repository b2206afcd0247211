"""Reading files that anybody may have written: plain data only, of bounded size and depth. Nothing is run.

Whatever is wrong with such a file is one of ``DAMAGE``, for its reader to say in one line.
"""

from __future__ import annotations

import json
import math
import struct
import tarfile
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
import yaml

DAMAGE = (
    OSError, ValueError, KeyError, IndexError, TypeError, AttributeError, ArithmeticError, EOFError,
    RecursionError, MemoryError, NotImplementedError, SyntaxError, struct.error, zipfile.BadZipFile,
    tarfile.TarError, zlib.error, tokenize.TokenError,
)  # fmt: skip
"""What a damaged or hostile file leads Python's readers to raise."""

TEXT_LIMIT = 1 << 20
"""Bytes of a file of options, at most."""
ARRAYS_LIMIT = 1 << 33
"""Bytes of an array in an ``.npz``, at most."""
ALWAYS = 4096
"""A number in a network's arguments that is allowed however small its file is."""


def one_line(error: object) -> str:
    """A text, an error's for example, as part of a message of one line."""
    text = " ".join(str(error).split())[:400]
    if isinstance(error, KeyError):
        return f"{text} is missing"
    return "nested too deeply" if isinstance(error, RecursionError) else text or type(error).__name__


def parse_json(text: str | bytes) -> Any:
    """The content of a JSON text; ``ValueError`` where it is none, or is nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _PlainLoader(yaml.SafeLoader):
    """Plain data without anchors: a few lines of references to references can stand for any amount."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise ValueError("references (*name) are not read")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> Any:
    """The plain data of a YAML file; ``OSError``, or ``ValueError`` where it is none or is too large."""
    with path.open("rb") as file:
        content = file.read(TEXT_LIMIT + 1)
    if len(content) > TEXT_LIMIT:
        raise ValueError(f"longer than {TEXT_LIMIT} bytes")
    try:
        return yaml.load(content, _PlainLoader)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (yaml.YAMLError, *DAMAGE) as error:  # a date that is none is a ValueError, for one
        raise ValueError(one_line(error)) from None


def array_header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype, bool]:
    """(shape, dtype, in Fortran order) of a ``.npy`` stream, which is left at the first number.

    ``ValueError`` for anything but an array of numbers or text: Python objects are not read.
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


def read_npz(path: Path, names: set[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays ``names`` (default: all) of an ``.npz``; each is no larger than its header says it is."""
    found = {}
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if names is not None and name not in names:
                continue
            with archive.open(info) as member:
                shape, dtype, fortran = array_header(member)
                size = math.prod(shape) * dtype.itemsize
                if not size <= min(info.file_size, ARRAYS_LIMIT):
                    raise ValueError(f"{name} claims {size} bytes")
                content = member.read(size + 1)
            if len(content) != size:
                raise ValueError(f"{name} is not of the size that its header says")
            found[name] = np.ndarray(shape, dtype, bytearray(content), order="F" if fortran else "C")
    return found


def check_ambition(arguments: Any, numbers: int) -> None:
    """``ValueError`` where a network's arguments ask for more than a file of so many numbers can fill."""
    if _largest(arguments) > max(numbers, ALWAYS):
        raise ValueError(f"its arguments ask for more than the {numbers} numbers that it holds")


def _largest(content: Any) -> float:
    if isinstance(content, dict):
        return max((_largest(value) for value in content.values()), default=0)
    if isinstance(content, (list, tuple)):
        return max((_largest(value) for value in content), default=0)
    return abs(content) if isinstance(content, (int, float)) else 0
