"""Sources of one encoded file per record: an image folder, an EDM ZIP, webdataset tars."""

from __future__ import annotations

import io
import os
import reprlib
import stat
import tarfile
import zipfile
from abc import abstractmethod
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import numpy as np

from diffratio_fast.data.scaling import SD_VAE, Vae
from diffratio_fast.data.sources.base import (
    IMAGE_SUFFIXES,
    MEMBER_LIMIT,
    TEST,
    TRAIN,
    VALIDATION,
    ImageOptions,
    Source,
    Unreadable,
    check_member,
    decode_image,
    decode_moments,
    digest,
    image_size,
)
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, one_line, open_regular, parse_json, read_bytes

UNLABELED = ("unlabelled",)  # words: ok (a class name in manifests)
INDEX_SHARE = 16
"""``dataset.json`` may take this part of --max-bytes: as Python objects it takes that many times its size."""


class FileSource(Source):
    """Records decoded from files: all images, or all ``.npy`` latent moments."""

    def __init__(self, path: Path, keys: list[str], sizes: list[int], options: ImageOptions) -> None:
        if not keys:
            raise UserError(f"{path}: no records; expected images or .npy latents")
        self.path, self.name, self._keys, self._sizes, self._options = path, path.stem, keys, sizes, options
        moments = [k.endswith(".npy") for k in keys]
        if any(moments) and not all(moments):
            raise UserError(
                f"{path}: contains images and .npy latents; expected one kind; prepare them separately"
            )
        self.splits = np.full(len(keys), TRAIN, np.uint8)
        self.kind = "latent_moments" if moments[0] else "image"
        self._decode_shape: tuple[int, int, int] | None = None
        if self.kind == "latent_moments":
            if options.resolution is not None:
                raise UserError("--resolution does not apply to latents; omit it")
            self.vae = Vae(SD_VAE)

    def _finish(self) -> None:
        """Set the record shape from the first readable record."""
        failed: list[str] = []
        for index in range(min(len(self), 100)):
            try:
                shape = self.read(index).shape
            except Unreadable as error:
                failed.append(str(error))
                continue
            self.shape = self._decode_shape = (shape[0], shape[1], shape[2])
            return
        raise UserError(f"{self.path}: no record can be read; first error: {failed[0]}")

    def read(self, index: int) -> np.ndarray:
        key = self.key(index)
        try:
            content = self._content(index)
        except (RuntimeError, *DAMAGE) as error:  # zipfile raises RuntimeError for an encrypted file
            raise Unreadable(f"{key}: {one_line(error)}") from None
        if self.kind == "latent_moments":
            return decode_moments(content, self._decode_shape, key)
        array = decode_image(content, self._options, key)
        if self._decode_shape is not None and array.shape != self._decode_shape:
            raise Unreadable(
                f"{key}: image {list(array.shape)} among {list(self._decode_shape)}, but all must have one "
                "size (`prepare --resolution` crops and scales them)"
            )
        return array

    def size(self, index: int) -> tuple[int, int] | None:
        """(width, height) in the header of image ``index``; None where it cannot be read. Thread-safe."""
        try:
            with self._open(index) as stream:
                return image_size(stream)
        except (RuntimeError, *DAMAGE):
            return None

    def key(self, index: int) -> str:
        return self._keys[index]

    def fingerprint(self) -> str:
        return digest(type(self).__name__, self._keys, self._sizes, self.labels, self.splits, self._options)

    @abstractmethod
    def _content(self, index: int) -> bytes:
        """The bytes of file ``index``; thread-safe."""

    def _open(self, index: int) -> BinaryIO:
        """File ``index`` as a stream, of which the header alone is read; thread-safe."""
        return io.BytesIO(self._content(index))


SPLIT_FOLDERS = {"train": TRAIN, "val": VALIDATION, "validation": VALIDATION, "test": TEST}


class ImageFolder(FileSource):
    """A folder of images with a sub-folder per class, optionally below ``train``, ``val`` and ``test``."""

    def __init__(self, path: Path, options: ImageOptions) -> None:
        folders = sorted(p.name for p in path.iterdir() if p.is_dir())
        split_roots = {f: SPLIT_FOLDERS[f] for f in folders if f in SPLIT_FOLDERS}
        if "train" not in split_roots or len(split_roots) != len(folders):
            split_roots = {"": TRAIN}
        found: list[tuple[str, int, str, int]] = []  # key, split, class, size
        self._others: list[str] = []
        for root, split in split_roots.items():
            images, others = _files_below(path, root)
            found += [(key, split, name, size) for key, name, size in images]
            self._others += others
        found.sort()
        super().__init__(path, [f[0] for f in found], [f[3] for f in found], options)
        self.class_names, self.labels = classes_of([f[2] for f in found])
        self.splits = np.array([f[1] for f in found], np.uint8)
        self._finish()

    def _content(self, index: int) -> bytes:
        if self._sizes[index] > MEMBER_LIMIT:
            raise OSError(f"{self._sizes[index]} bytes; expected at most {MEMBER_LIMIT} for one image")
        return read_bytes(self.path / self._keys[index], MEMBER_LIMIT)

    def _open(self, index: int) -> BinaryIO:
        return open_regular(self.path / self._keys[index])

    def require_mostly_images(self) -> None:
        """Raise ``UserError`` where most files are no images: the folder was hardly meant as a data set."""
        if len(self._others) > len(self):
            images = f"{len(self)} image{'s' * (len(self) > 1)} ({self.key(0)})"
            raise UserError(
                f"{self.path}: holds {images} among {len(self._others)} other files "
                f"({min(self._others)}, ...), so it is hardly an image data set; name the folder of the "
                "images, or take these all the same with --format folder"
            )


def _files_below(path: Path, root: str) -> tuple[list[tuple[str, str, int]], list[str]]:
    """Images below ``path/root``, (path relative to ``path``, class name, size) each, and other files.

    A file that is named as an image beside it (a caption, a label) is neither.
    """
    images: list[tuple[str, str, int]] = []
    others: list[str] = []
    for folder, _, files in os.walk(path / root):
        below = Path(folder).relative_to(path / root).parts
        visible = [name for name in files if not name.startswith(".")]
        pictures = {name for name in visible if name.lower().endswith(IMAGE_SUFFIXES)}
        stems = {Path(name).stem for name in pictures}
        for name in visible:
            file = Path(folder, name)
            key = file.relative_to(path).as_posix()
            if name in pictures:
                images.append((key, below[0] if below else "", _size_of(file)))
            elif Path(name).stem not in stems:
                others.append(key)
    return images, others


def _size_of(file: Path) -> int:
    """Bytes of a regular file; anything else that is called an image is a ``UserError``."""
    try:
        about = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}") from None
    if not stat.S_ISREG(about.st_mode):
        raise UserError(f"{file}: not a regular file; remove it")
    return about.st_size


def classes_of(names: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names in order and labels int64 (N,) of each record's class name."""
    unique = sorted(set(names))
    index = {name: i for i, name in enumerate(unique)}
    if unique == [""]:
        return UNLABELED, np.zeros(len(names), np.int64)
    if "" in index:
        raise UserError(
            "some images are in class folders and some are not; move each image into a class folder"
        )
    return tuple(unique), np.array([index[n] for n in names], np.int64)


def numbered_classes(labels: list[object], where: object) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names "0", "1", … and labels int64 (N,) of integer labels; one class if all are None."""
    if all(label is None for label in labels):
        return UNLABELED, np.zeros(len(labels), np.int64)
    for i, label in enumerate(labels):
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < 1 << 20:
            shown = reprlib.repr(label)
            raise UserError(
                f"{where}: record {i} has label {shown}; expected an integer from 0 for every record, or no "
                "labels"
            )
    array = np.array(labels, np.int64)
    return tuple(str(i) for i in range(int(array.max()) + 1)), array


class EdmZip(FileSource):
    """The ZIP of EDM and EDM2: PNG images or ``img-mean-std-*.npy`` moments, labels in ``dataset.json``."""

    def __init__(self, path: Path, options: ImageOptions) -> None:
        try:
            self._zip = zipfile.ZipFile(open_regular(path))
        except DAMAGE as error:
            raise UserError(f"{path}: not a readable ZIP ({one_line(error)})") from None
        members = {}
        for info in self._zip.infolist():
            is_index = PurePosixPath(info.filename).name == "dataset.json"
            limit = options.max_bytes // INDEX_SHARE if is_index else MEMBER_LIMIT
            check_member(path, info.filename, info.file_size, limit)
            members[info.filename] = info
        records = sorted(n for n in members if n.lower().endswith((*IMAGE_SUFFIXES, ".npy")))
        super().__init__(path, records, [members[n].CRC for n in records], options)
        self._members = [members[n] for n in records]
        self.class_names, self.labels = numbered_classes(self._read_labels(members, records), path)
        self._finish()

    def _read_labels(self, members: dict[str, zipfile.ZipInfo], records: list[str]) -> list[object]:
        if "dataset.json" not in members:
            return [None] * len(records)
        try:
            entries = parse_json(self._zip.read("dataset.json")).get("labels")
            by_name = dict(entries) if entries else {}
        except DAMAGE as error:
            raise UserError(f"{self.path}: dataset.json cannot be read ({one_line(error)})") from None
        missing = [n for n in records if n not in by_name] if by_name else []
        if missing:
            raise UserError(f"{self.path}: dataset.json has no label for {missing[0]} ({len(missing)} such)")
        return [by_name.get(n) for n in records]

    def _content(self, index: int) -> bytes:
        info = self._members[index]
        with self._zip.open(info) as member:  # reading to the end checks the CRC
            content = member.read(info.file_size + 1)
        if len(content) != info.file_size:
            raise OSError(f"{len(content)} bytes instead of {info.file_size}")
        return content


class WebDataset(FileSource):
    """webdataset tars: files with the same name up to the first dot are one record.

    The label is the integer in a ``.cls`` file, or ``label`` in a ``.json`` file.
    """

    def __init__(self, path: Path, options: ImageOptions) -> None:
        self._tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        self._where: list[tuple[int, int, int]] = []  # file descriptor, offset, size
        self._files: list[int] = []
        keys: list[str] = []
        labels: list[object] = []
        for tar in self._tars:
            try:
                with open_regular(tar) as file:
                    self._files.append(os.dup(file.fileno()))
            except OSError as error:
                raise UserError(f"{tar}: {error.strerror or error}") from None
            for key, record, label in _tar_records(tar):
                keys.append(f"{tar.name}/{key}")
                self._where.append((self._files[-1], record.offset_data, record.size))
                labels.append(label)
        super().__init__(path, keys, [w[2] for w in self._where], options)
        self.class_names, self.labels = numbered_classes(labels, path)
        self._finish()

    def __del__(self) -> None:
        for file in getattr(self, "_files", ()):
            os.close(file)

    def _content(self, index: int) -> bytes:
        file, offset, size = self._where[index]
        content = os.pread(file, size, offset)
        if len(content) != size:
            raise OSError(f"{len(content)} bytes instead of {size}")
        return content


def _tar_records(tar: Path) -> list[tuple[str, tarfile.TarInfo, object]]:
    """(name, member, label) of every record of a tar, in its order."""
    records: dict[str, tarfile.TarInfo] = {}
    labels: dict[str, object] = {}
    end = tar.stat().st_size
    try:
        with open_regular(tar) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            for member in archive:
                check_member(tar, member.name, member.size)
                if member.isdir():
                    continue
                if not member.isreg() or member.issparse():
                    raise UserError(
                        f"{tar}: member {member.name!r} is a link, a device or sparse; expected a regular "
                        "file"
                    )
                if member.offset_data + member.size > end:
                    raise UserError(f"{tar}: truncated in {member.name!r}; restore the file")
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                key, suffix = f"{folder}/{stem}" if folder else stem, suffix.lower()
                if suffix in ("cls", "json"):
                    labels[key] = _tar_label(archive, member, suffix, tar)
                elif f".{suffix}" in IMAGE_SUFFIXES or suffix == "npy":
                    if key in records:
                        raise UserError(f"{tar}: two records have the name {key!r}; expected unique names")
                    records[key] = member
    except DAMAGE as error:
        raise UserError(
            f"{tar}: not a readable tar ({one_line(error)}); decompress it if it is compressed"
        ) from None
    return [(f"{key}{PurePosixPath(m.name).suffix}", m, labels.get(key)) for key, m in records.items()]


def _tar_label(archive: tarfile.TarFile, member: tarfile.TarInfo, suffix: str, tar: Path) -> object:
    stream = archive.extractfile(member)
    content = stream.read(1 << 20) if stream else b""
    try:
        return int(content) if suffix == "cls" else parse_json(content).get("label")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{tar}: {member.name!r} contains no label ({error}); expected an integer") from None
