"""Every kind of source: data is read correctly, and hostile or broken files are rejected."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.data_cases import edm_zip, image_folder, moments, npy, picture, png

from diffratio_fast.data.sources import ImageOptions, Source, Unreadable, arrays, cut_splits, open_source
from diffratio_fast.data.sources.base import decode_image
from diffratio_fast.errors import UserError


def opened(path: Path, **options: object) -> Source:
    return open_source(path, "auto", ImageOptions(**options))  # type: ignore[arg-type]


def planes(image: np.ndarray) -> np.ndarray:
    return image.transpose(2, 0, 1)


# ----------------------------------------------------------------------------------- image folder


def test_image_folder_has_a_class_per_folder(tmp_path: Path) -> None:
    source = opened(image_folder(tmp_path / "x", classes=2, per_class=3))
    assert source.class_names == ("class0", "class1") and source.labels.tolist() == [0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(source.read(4), planes(picture(1001)))
    assert source.key(4) == "class1/001.png" and source.format == "folder"


def test_image_folder_with_splits(tmp_path: Path) -> None:
    for split, count in (("train", 4), ("val", 2), ("test", 1)):
        image_folder(tmp_path / "x" / split, classes=2, per_class=count)
    source = opened(tmp_path / "x")
    assert np.bincount(source.splits).tolist() == [8, 4, 2] and source.class_names == ("class0", "class1")


def test_images_beside_class_folders_are_refused(tmp_path: Path) -> None:
    image_folder(tmp_path / "x")
    (tmp_path / "x" / "stray.png").write_bytes(png(picture(0)))
    with pytest.raises(UserError, match="class folder"):
        opened(tmp_path / "x")


def test_an_unreadable_image_names_its_file(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "x", classes=1)
    (folder / "class0" / "003.png").write_bytes(png(picture(3))[:60])
    (folder / "class0" / "005.png").write_bytes(png(picture(5, 9, 9)))
    source = opened(folder)
    with pytest.raises(Unreadable, match=r"class0/003\.png"):
        source.read(3)
    with pytest.raises(Unreadable, match=r"class0/005\.png: image \[3, 9, 9\] among \[3, 8, 8\]"):
        source.read(5)


def gradient(height: int, width: int) -> bytes:
    rows, columns = np.mgrid[0:height, 0:width]
    image = np.stack([255 * rows / height, 255 * columns / width, 0 * rows + 7], -1)
    return png(image.astype(np.uint8))


@pytest.mark.parametrize("crop", ["dhariwal", "lanczos"])
@pytest.mark.parametrize("size", [(100, 70), (70, 100), (16, 20), (257, 64)])
def test_crops_keep_the_center_square(crop: str, size: tuple[int, int]) -> None:
    height, width = size
    out = decode_image(gradient(height, width), ImageOptions(16, crop), "x")
    assert out.shape == (3, 16, 16) and out.dtype == np.uint8
    # Resizing keeps a gradient: compare with its values at the centers of the output's pixels.
    side, centers = min(size), (np.arange(16) + 0.5) / 16
    rows = 255 * ((height - side) / 2 + centers * side) / height
    columns = 255 * ((width - side) / 2 + centers * side) / width
    inner = slice(1, -1)
    tolerance = 255 / 16
    assert np.abs(out[0].mean(1) - rows)[inner].max() < tolerance
    assert np.abs(out[1].mean(0) - columns)[inner].max() < tolerance
    assert np.all(out[2] == 7)


def test_the_two_crops_are_different_filters() -> None:
    content = png(picture(1, 64, 64))
    a, b = (
        decode_image(content, ImageOptions(16, crop), "x").astype(int) for crop in ("dhariwal", "lanczos")
    )
    assert np.abs(a - b).max() > 5


def test_gray_and_deep_images() -> None:
    assert decode_image(png(picture(1)), ImageOptions(channels=1), "x").shape == (1, 8, 8)
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(deep, "PNG")
    with pytest.raises(Unreadable, match="8 bits"):
        decode_image(deep.getvalue(), ImageOptions(), "x")


# ---------------------------------------------------------------------------------------- EDM ZIP


def test_edm_zip_of_images(tmp_path: Path) -> None:
    members = {f"00000/img{i:08d}.png": png(picture(i)) for i in range(5)}
    source = opened(edm_zip(tmp_path / "x.zip", members, [2, 0, 1, 0, 2]))
    assert source.kind == "image" and source.labels.tolist() == [2, 0, 1, 0, 2]
    assert source.class_names == ("0", "1", "2")
    np.testing.assert_array_equal(source.read(3), planes(picture(3)))


def test_edm_zip_without_labels(tmp_path: Path) -> None:
    source = opened(edm_zip(tmp_path / "x.zip", {"a.png": png(picture(0))}))
    assert source.class_names == ("unlabelled",)  # words: ok
    assert source.labels.tolist() == [0]


def test_edm_zip_of_moments(tmp_path: Path) -> None:
    members = {f"00000/img-mean-std-{i:08d}.npy": npy(moments(i)) for i in range(3)}
    source = opened(edm_zip(tmp_path / "x.zip", members, [0, 1, 2]))
    assert source.kind == "latent_moments" and source.shape == (8, 4, 4)
    assert source.vae is not None and source.vae.name == "stabilityai/sd-vae-ft-mse"
    np.testing.assert_array_equal(source.read(2), moments(2))


def test_moments_decode_in_many_threads(tmp_path: Path) -> None:
    source = opened(edm_zip(tmp_path / "x.zip", {f"{i:04d}.npy": npy(moments(i)) for i in range(400)}))
    with ThreadPoolExecutor(8) as pool:
        for i, array in enumerate(pool.map(source.read, range(400))):
            np.testing.assert_array_equal(array, moments(i))


def hostile_header() -> bytes:
    """A ``.npy`` of a few bytes that claims a terabyte."""
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (8, 262144, 262144), }"
    header += b" " * (117 - len(header)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    "content",
    [
        hostile_header(),
        npy(moments(1))[:-4],
        npy(moments(1)) + b"x",
        npy(moments(1).astype(np.float64)),
        npy(moments(1)[:7]),
        npy(np.array([{}, {}], dtype=object)),
        b"not an array",
        npy(moments(1, side=8)),
    ],
)
def test_moments_that_are_not_what_they_should_be(tmp_path: Path, content: bytes) -> None:
    members = {"a.npy": npy(moments(0)), "b.npy": content}
    source = opened(edm_zip(tmp_path / "x.zip", members))
    source.read(0)
    with pytest.raises(Unreadable, match=r"b\.npy"):
        source.read(1)


@pytest.mark.parametrize("name", ["../x.png", "/x.png", "a\\b.png", "a/../../x.png", "a\nb.png"])
def test_zip_and_tar_members_with_hostile_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="unsafe name"):
        opened(edm_zip(tmp_path / "x.zip", {"a.png": png(picture(0)), name: b""}))
    with pytest.raises(UserError, match="unsafe name"):
        opened(tar(tmp_path / "x.tar", {"a.png": png(picture(0)), name: b""}))


def test_zip_members_of_hostile_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = edm_zip(tmp_path / "x.zip", {"a.png": png(picture(0)), "b.png": bytes(3000)})
    assert len(opened(path)) == 2
    monkeypatch.setattr("diffratio_fast.data.sources.files.MEMBER_LIMIT", 2000)
    with pytest.raises(UserError, match=r"'b\.png' has 3000 bytes"):
        opened(path)


def test_damaged_zips(tmp_path: Path) -> None:
    path = edm_zip(tmp_path / "x.zip", {"a.png": png(picture(0)), "b.png": png(picture(1))}, [0, 1])
    content = bytearray(path.read_bytes())
    content[content.index(b"IDAT") + 20] ^= 1  # in a.png
    path.write_bytes(content)
    with pytest.raises(Unreadable, match=r"a\.png"):
        opened(path).read(0)
    path.write_bytes(content[:-30])
    with pytest.raises(UserError, match="not a readable ZIP"):
        opened(path)


def test_dataset_json_that_misses_a_record(tmp_path: Path) -> None:
    import zipfile

    path = edm_zip(tmp_path / "x.zip", {"a.png": png(picture(0))}, [1])
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("b.png", png(picture(1)))
    with pytest.raises(UserError, match=r"no label for b\.png"):
        opened(path)


# ------------------------------------------------------------------------------------- webdataset


def tar(path: Path, members: dict[str, bytes], **extra: tarfile.TarInfo) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        for info in extra.values():
            archive.addfile(info)
    return path


def test_webdataset_tars(tmp_path: Path) -> None:
    folder = tmp_path / "tars"
    folder.mkdir()
    for t in range(2):
        members = {}
        for i in range(3):
            members[f"{t}/{i}.png"] = png(picture(10 * t + i))
            label = {"cls": str(i).encode(), "json": json.dumps({"label": i}).encode()}
            members[f"{t}/{i}.{'cls' if t else 'json'}"] = label["cls" if t else "json"]
        tar(folder / f"{t:05d}.tar", members)
    source = opened(folder)
    assert source.labels.tolist() == [0, 1, 2, 0, 1, 2] and source.format == "webdataset"
    np.testing.assert_array_equal(source.read(4), planes(picture(11)))
    assert source.key(4) == "00001.tar/1/1.png"
    assert len(opened(folder / "00000.tar")) == 3


def test_hostile_and_broken_tars(tmp_path: Path) -> None:
    link = tarfile.TarInfo("b.png")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
    with pytest.raises(UserError, match="a link, a device or sparse"):
        opened(tar(tmp_path / "link.tar", {"a.png": png(picture(0))}, link=link))
    good = tar(tmp_path / "good.tar", {"a.png": png(picture(0)), "b.png": png(picture(1, 64, 64))})
    cut = tmp_path / "cut.tar"
    cut.write_bytes(good.read_bytes()[:4000])
    with pytest.raises(UserError, match=r"truncated in|not a readable tar"):
        opened(cut)
    packed = tmp_path / "packed.tar"
    packed.write_bytes(gzip.compress(good.read_bytes()))
    with pytest.raises(UserError, match="not a readable tar"):
        opened(packed)
    with pytest.raises(UserError, match="contains no label"):
        opened(tar(tmp_path / "label.tar", {"a.png": png(picture(0)), "a.cls": b"cat"}))


# --------------------------------------------------------------------------------------- CIFAR-10


@pytest.fixture
def cifar(monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Six small batches, uint8 (20, 3073), with their md5 digests instead of the published ones."""
    rng = np.random.default_rng(0)
    batches = {name: rng.integers(0, 256, (20, 3073), np.uint8) for name in arrays.CIFAR10_MD5}
    for batch in batches.values():
        batch[:, 0] %= 10
    md5 = {name: hashlib.md5(batch.tobytes()).hexdigest() for name, batch in batches.items()}
    monkeypatch.setattr(arrays, "CIFAR10_MD5", md5)
    return batches


def python2_pickle(labels: list[int], pixels: np.ndarray) -> bytes:
    """The opcodes with which Python 2 and its NumPy wrote the published batches (protocol 2)."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes([len(value)]) + value

    def integer(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little", signed=True)

    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + integer(0) + b"\x85" + text(b"b")
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + integer(0) + integer(1) + b"\x87R"
    dtype += b"(" + integer(3) + text(b"|") + b"NNN" + integer(-1) * 2 + integer(0) + b"tb"
    shape = integer(len(pixels)) + integer(pixels.shape[1]) + b"\x86"
    content = b"T" + pixels.size.to_bytes(4, "little") + pixels.tobytes()
    array += b"\x87R(" + integer(1) + shape + dtype + b"\x89" + content + b"tb"
    items = text(b"labels") + b"](" + b"".join(integer(y) for y in labels) + b"e" + text(b"data") + array
    return b"\x80\x02}(" + text(b"batch_label") + text(b"training batch 1 of 5") + items + b"u."


def write_cifar(folder: Path, batches: dict[str, np.ndarray], form: str) -> Path:
    folder.mkdir()
    train: list[int] = []
    for name, batch in batches.items():
        labels, pixels = batch[:, 0].tolist(), batch[:, 1:]
        if form == "binary":
            (folder / f"{name}.bin").write_bytes(batch.tobytes())
        elif form == "python":
            (folder / name).write_bytes(python2_pickle(labels, pixels))
        else:
            sheet = pixels.reshape(-1, 3, 1024).transpose(0, 2, 1)
            (folder / f"{name}.png").write_bytes(png(np.ascontiguousarray(sheet)))
            if name == "test_batch":
                (folder / "test_lables.json").write_text(json.dumps(labels))
            else:
                train += labels
                (folder / "train_lables.json").write_text(json.dumps(train))
    return folder


@pytest.mark.parametrize("form", ["binary", "python", "npm"])
@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_in_every_form(tmp_path: Path, cifar: dict[str, np.ndarray], form: str, packed: bool) -> None:
    path = write_cifar(tmp_path / "package", cifar, form)
    if packed:
        with tarfile.open(tmp_path / "cifar.tar.gz", "w:gz") as archive:
            archive.add(path, "package")
        path = tmp_path / "cifar.tar.gz"
    source = opened(path)
    assert source.shape == (3, 32, 32) and source.class_names[0] == "airplane" and source.format == "cifar10"
    assert np.bincount(source.splits).tolist() == [100, 0, 20]
    everything = np.concatenate(list(cifar.values()))
    assert source.labels.tolist() == everything[:, 0].tolist()
    np.testing.assert_array_equal(source.read(47).reshape(-1), everything[47, 1:])


@pytest.mark.parametrize("form", ["binary", "python", "npm"])
def test_cifar10_with_a_wrong_pixel_is_refused(
    tmp_path: Path, cifar: dict[str, np.ndarray], form: str
) -> None:
    cifar["data_batch_3"][7, 100] ^= 1
    with pytest.raises(UserError, match=r"data_batch_3 does not match CIFAR-10 \(wrong md5\)"):
        opened(write_cifar(tmp_path / "x", cifar, form))


class Exploit:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch exploited",)


def test_a_hostile_python_batch_runs_nothing(
    tmp_path: Path, cifar: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_cifar(tmp_path / "x", cifar, "python")
    for content in (Exploit(), {b"data": np.array([Exploit()]), b"labels": [1]}):
        (folder / "data_batch_2").write_bytes(pickle.dumps(content))
        with pytest.raises(UserError, match="data_batch_2 is not a CIFAR-10 python batch"):
            opened(folder)
    assert not (tmp_path / "exploited").exists()


def test_cifar10_published_md5s_are_those_of_the_binary_version() -> None:
    """Agrees with a copy of the data, if an environment variable gives its path."""
    where = os.environ.get("DIFFRATIO_CIFAR10")
    if not where:
        pytest.skip("DIFFRATIO_CIFAR10 names no copy of CIFAR-10")
    source = opened(Path(where))
    assert np.bincount(source.labels).tolist() == [6000] * 10 and len(source) == 60_000


# -------------------------------------------------------------------------------------- IDX files


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()


def idx_folder(root: Path, *, packed: bool = True) -> Path:
    root.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", 30), ("t10k", 10)):
        images = rng.integers(0, 256, (count, 5, 6), np.uint8)
        for what, array in (("images", images), ("labels", np.arange(count, dtype=np.uint8) % 10)):
            content = idx_bytes(array)
            name = f"{split}-{what}-idx{array.ndim}-ubyte"
            (root / (name + ".gz" * packed)).write_bytes(gzip.compress(content) if packed else content)
    return root


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files(tmp_path: Path, packed: bool) -> None:
    source = opened(idx_folder(tmp_path / "digits", packed=packed))
    assert source.shape == (1, 5, 6) and source.name == "digits" and len(source.class_names) == 10
    assert np.bincount(source.splits).tolist() == [30, 0, 10]
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 6), np.uint8)
    np.testing.assert_array_equal(source.read(29), images[29][None])


def test_broken_idx_files(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path / "x", packed=False)
    images = folder / "train-images-idx3-ubyte"
    whole = images.read_bytes()
    for content, message in (
        (whole[:-1], "truncated"),
        (whole + b"x", "damaged"),
        (b"\0\0\x0d" + whole[3:], "not an IDX file"),
        (whole[:4] + b"\xff" * 12, r"claims 79228162458924105385300197375 bytes, more than 2147483648"),
        (idx_bytes(np.zeros((29, 5, 6), np.uint8)), "29 train images but 30 labels"),
    ):
        images.write_bytes(content)
        with pytest.raises(UserError, match=message):
            opened(folder)
    images.unlink()
    with pytest.raises(UserError, match="no IDX file of the train images"):
        opened(folder)
    packed = idx_folder(tmp_path / "y")
    file = packed / "t10k-labels-idx1-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(UserError, match="cannot be read"):
        opened(packed)


# ----------------------------------------------------------------------------------------- splits


def test_splits_are_cut_at_random_and_fixed() -> None:
    splits = np.zeros(1000, np.uint8)
    a, b = (cut_splits(splits, "0.2", "50", seed) for seed in (0, 0))
    np.testing.assert_array_equal(a, b)
    assert np.bincount(a).tolist() == [750, 200, 50]
    assert np.any(cut_splits(splits, "0.2", "50", 1) != a)
    assert np.bincount(cut_splits(splits, None, None, 0)).tolist() == [800, 100, 100]
    assert np.bincount(cut_splits(splits, "0", "0", 0)).tolist() == [1000]


def test_splits_the_source_has_stay() -> None:
    splits = np.repeat(np.array([0, 2], np.uint8), [90, 10])
    cut = cut_splits(splits, None, None, 0)
    assert np.all(cut[90:] == 2) and np.bincount(cut).tolist() == [81, 9, 10]
    with pytest.raises(UserError, match="its own test split"):
        cut_splits(splits, None, "5", 0)


@pytest.mark.parametrize("wanted", ["-1", "x", "1.5", "inf", "nan", "90"])
def test_bad_split_sizes(wanted: str) -> None:
    with pytest.raises(UserError):
        cut_splits(np.zeros(90, np.uint8), wanted, "0", 0)


def test_nothing_to_read(tmp_path: Path) -> None:
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError):
            opened(path)
    (tmp_path / "x.rar").write_bytes(b"")
    with pytest.raises(UserError, match="--format"):
        opened(tmp_path / "x.rar")
