"""The source interface, and what all sources share: splits, input checks, decoding of images."""

from __future__ import annotations

import hashlib
import io
import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import numpy as np

from diffratio_fast.data.dataset import SPLITS
from diffratio_fast.data.sampler import permutation
from diffratio_fast.data.scaling import Vae
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import UNPACKED_LIMIT

TRAIN, VALIDATION, TEST = range(len(SPLITS))
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".gif", ".tif", ".tiff")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "PPM", "GIF", "TIFF")
"""Formats that Pillow may open, independent of the file name; some other formats run programs."""
MEMBER_LIMIT = 1 << 28
"""Maximum bytes of the file of one record."""
PIXELS_LIMIT = 1 << 27
"""Default of --max-pixels: pixels of an image, as it is and after it is scaled, at most."""


class Unreadable(Exception):
    """One record cannot be read; the message gives the record and the reason."""


class Source(ABC):
    """Labeled records of one shape in a fixed order, each assigned to a split."""

    name: str
    format: str = ""
    """The kind of source, a key of ``FORMATS``"""
    kind: str = "image"
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    labels: np.ndarray
    """int64 (N,)"""
    splits: np.ndarray
    """uint8 (N,): an index into ``SPLITS``"""
    vae: Vae | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def read(self, index: int) -> np.ndarray:
        """Record ``index``: uint8 [C, H, W], or moments [2c, h, w]. Thread-safe; raises ``Unreadable``."""

    @abstractmethod
    def key(self, index: int) -> str:
        """A readable name of record ``index``."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A digest that depends on the content and not on the path. Fast: it may skip bytes."""


@dataclass(frozen=True)
class ImageOptions:
    """How image files become records: RGB or gray, cropped square to ``resolution`` (None: as they are).

    ``max_pixels`` and ``max_bytes`` bound what a file may unpack to in memory: an image, and a source that is
    held as a whole. They are no part of a source's fingerprint.
    """

    resolution: int | None = None
    crop: str = "dhariwal"
    channels: int = 3
    max_pixels: int = field(default=PIXELS_LIMIT, repr=False)
    max_bytes: int = field(default=UNPACKED_LIMIT, repr=False)


CROPS = ("dhariwal", "lanczos")


def decode_image(content: bytes, options: ImageOptions, key: str) -> np.ndarray:
    """Decode an image to uint8 [C, H, W]; raises ``Unreadable`` if it cannot be decoded.

    ``dhariwal``: halve with a box filter while the short side is at least twice the resolution, resize
    to the resolution (bicubic), then crop the center. ``lanczos``: crop the center square, then resize.
    """
    from PIL import UnidentifiedImageError

    try:
        with open_image(content, FORMATS, options.max_pixels) as image:
            if image.mode in ("I", "F") or image.mode.startswith("I;"):
                raise ValueError(f"pixels of mode {image.mode} need more than 8 bits")
            pixels = image.convert("RGB" if options.channels == 3 else "L")
        if options.resolution is not None:
            crop = crop_dhariwal if options.crop == "dhariwal" else crop_lanczos
            _check_scaled(pixels.size, options)
            pixels = crop(pixels, options.resolution)
        array = np.asarray(pixels)
    except UnidentifiedImageError:  # its message shows the stream's repr
        raise Unreadable(f"{key}: not an image of a known format ({', '.join(FORMATS)})") from None
    except Exception as error:  # image plugins raise many exception types
        raise Unreadable(f"{key}: {error or type(error).__name__}") from None
    return np.ascontiguousarray(array.transpose(2, 0, 1) if array.ndim == 3 else array[None])


def open_image(content: bytes, formats: tuple[str, ...], max_pixels: int) -> Any:
    """An image whose size is known and whose pixels are not unpacked; ``ValueError`` where they are many."""
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # checked here, and before any pixel is unpacked
    image = Image.open(io.BytesIO(content), formats=formats)
    if image.width * image.height > max_pixels:
        raise ValueError(
            f"an image of {image.width} x {image.height} pixels, more than {max_pixels} (--max-pixels)"
        )
    return image


def _check_scaled(size: tuple[int, int], options: ImageOptions) -> None:
    """``ValueError`` where an image of this size has too many pixels once its short side is scaled."""
    width, height = size
    resolution = options.resolution or 0
    long = max(width, height) * resolution // min(width, height)
    if options.crop == "dhariwal" and long * resolution > options.max_pixels:
        raise ValueError(
            f"an image of {width} x {height} pixels takes {resolution} x {long} at that --resolution, "
            f"more than {options.max_pixels} (--max-pixels)"
        )


def image_size(stream: BinaryIO) -> tuple[int, int] | None:
    """(width, height) in the header of an encoded image; None where it is not one."""
    from PIL import Image

    try:
        with Image.open(stream, formats=FORMATS) as image:
            return image.size
    except Exception:  # image plugins raise whatever they meet
        return None


def crop_dhariwal(image, size: int):  # type: ignore[no-untyped-def]
    """The ImageNet crop of Dhariwal and Nichol (2021)."""
    from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def crop_lanczos(image, size: int):  # type: ignore[no-untyped-def]
    """The older ImageNet-64 convention: the center square, resized with a Lanczos filter."""
    from PIL import Image

    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)


def decode_moments(content: bytes, shape: tuple[int, int, int] | None, key: str) -> np.ndarray:
    """Decode the moments [2c, h, w], float32 or float16, of a ``.npy`` file.

    ``shape`` is the expected shape, or None. The header is checked before memory is allocated. Raises
    ``Unreadable``.
    """
    try:
        found, dtype, start = _npy_header(content)
        if len(found) != 3 or found[0] % 2 or dtype not in ("<f4", "<f2"):
            raise ValueError(f"{dtype} {list(found)}; expected float32 or float16 moments [2c, h, w]")
        if shape is not None and found != shape:
            raise ValueError(f"shape {list(found)} instead of {list(shape)}")
        count = math.prod(found)
        if len(content) - start != count * np.dtype(dtype).itemsize:
            raise ValueError(f"{len(content)} bytes do not match {dtype} {list(found)}")
        return np.frombuffer(content, dtype, count, start).reshape(found)
    except ValueError as error:
        raise Unreadable(f"{key}: {error}") from None


def _npy_header(content: bytes) -> tuple[tuple[int, ...], str, int]:
    """(shape, dtype, offset of the data) of a ``.npy`` file in C order; raises ValueError.

    NumPy's reader parses the header with Python's parser. In CPython 3.11 that parser sometimes fails when
    several threads use it.
    """
    if content[:6] != b"\x93NUMPY" or len(content) < 12:
        raise ValueError("not a .npy file")
    begin = 10 if content[6] == 1 else 12
    start = begin + int.from_bytes(content[8:begin], "little")
    header = content[begin:start].decode("latin-1")
    dtype = re.search(r"'descr': *'([^']*)'", header)
    shape = re.search(r"'shape': *\(([0-9, ]*)\)", header)
    if dtype is None or shape is None or not re.search(r"'fortran_order': *False", header):
        raise ValueError("not a .npy file of numbers in C order")
    return tuple(int(n) for n in shape[1].split(",") if n.strip()), dtype[1], start


def check_member(archive: object, name: str, size: int, limit: int = MEMBER_LIMIT) -> None:
    """Raise ``UserError`` if a member's name leaves the archive's folder or its size exceeds ``limit``."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or any(ord(c) < 32 for c in name):
        raise UserError(f"{archive}: member {name!r} has an unsafe name; expected a path inside the archive")
    if size > limit:
        raise UserError(f"{archive}: member {name!r} has {size} bytes; expected at most {limit}")


def cut_splits(splits: np.ndarray, validation: str | None, test: str | None, seed: int) -> np.ndarray:
    """Assign random training records to the splits that a source does not have: uint8 (N,).

    ``validation`` and ``test`` are counts ("5000") or fractions ("0.1"). None means a tenth, at most
    10,000. Raises ``UserError`` for a size of a split that the source has.
    """
    splits = splits.copy()
    train = np.flatnonzero(splits == TRAIN)
    train = train[permutation(seed, 0, len(train))] if len(train) else train
    taken = 0
    for split, wanted in ((TEST, test), (VALIDATION, validation)):
        if np.any(splits == split):
            if wanted is not None:
                raise UserError(
                    f"--{SPLITS[split]}: the source has its own {SPLITS[split]} split; omit --{SPLITS[split]}"
                )
            continue
        count = _split_size(wanted, len(train), SPLITS[split])
        splits[train[taken : taken + count]] = split
        taken += count
    if taken >= len(train):
        raise UserError(
            f"the splits take {taken} of {len(train)} training records; lower --validation or --test"
        )
    return splits


TEST_SHARE, MOST_VALIDATION = 2, 5_000
"""With ``whole_train``: validation records are one in so many of the test side's, and at most this many."""


def whole_train(splits: np.ndarray, validation: str | None, seed: int) -> np.ndarray:
    """Split the source's test side into validation and test; training records stay as published: uint8 (N,).

    ``validation`` is a count or a fraction of the test side; None is half, 5,000 at most.
    """
    splits = splits.copy()
    side = np.flatnonzero(splits != TRAIN)
    if not len(side):
        raise UserError(
            "--protocol keeps the whole training set and takes validation from the test side, but the source "
            "has no test records; set --test-source, or omit --protocol"
        )
    if np.any(splits == VALIDATION) and np.any(splits == TEST):
        if validation is not None:
            raise UserError("--validation: the source has its own validation split; omit --validation")
        return splits
    count = (
        min(len(side) // TEST_SHARE, MOST_VALIDATION)
        if validation is None
        else _split_size(validation, len(side), "validation")
    )
    if count >= len(side):
        raise UserError(f"{len(side)} records of the test side cannot spare {count}; lower --validation")
    splits[side] = TEST
    splits[side[permutation(seed, 0, len(side))[:count]]] = VALIDATION
    return splits


def _split_size(wanted: str | None, available: int, split: str) -> int:
    if wanted is None:
        return min(available // 10, 10_000)
    try:
        number = float(wanted)
        if not number >= 0 or (number >= 1 and number != int(number)):
            raise ValueError
    except (ValueError, OverflowError):
        raise UserError(f"--{split} {wanted}: not a size; expected a count or a fraction below 1") from None
    return int(number) if number >= 1 or number == 0 else int(number * available)


def digest(*parts: object) -> str:
    """sha256 of the parts' text, for fingerprints."""
    state = hashlib.sha256()
    for part in parts:
        state.update(part.tobytes() if isinstance(part, np.ndarray) else repr(part).encode())
        state.update(b"\0")
    return state.hexdigest()


class Joined(Source):
    """A source and a second one of the same kind, shape and classes, which becomes the test split."""

    def __init__(self, first: Source, test: Source) -> None:
        for what in ("kind", "shape", "class_names"):
            if getattr(first, what) != getattr(test, what):
                raise UserError(
                    f"--test-source: {what.replace('_', ' ')} {getattr(test, what)} does not match the "
                    "source; expected "
                    f"{getattr(first, what)}"
                )
        if np.any(first.splits == TEST):
            raise UserError("--test-source: the source has its own test split; omit --test-source")
        self._parts = (first, test)
        self.name, self.format, self.kind = first.name, first.format, first.kind
        self.shape, self.vae = first.shape, first.vae
        self.class_names = first.class_names
        self.labels = np.concatenate([first.labels, test.labels])
        self.splits = np.concatenate([first.splits, np.full(len(test), TEST, np.uint8)])

    def _at(self, index: int) -> tuple[Source, int]:
        n = len(self._parts[0])
        return (self._parts[0], index) if index < n else (self._parts[1], index - n)

    def read(self, index: int) -> np.ndarray:
        source, i = self._at(index)
        return source.read(i)

    def key(self, index: int) -> str:
        source, i = self._at(index)
        return source.key(i)

    def fingerprint(self) -> str:
        return digest(*(part.fingerprint() for part in self._parts))
