"""Fuzz targets: every reader of untrusted files, with seeds and the errors it may raise."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image

from diffratio_fast import networks
from diffratio_fast.config.options import read_yaml
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.manifest import read_manifest
from diffratio_fast.data.sources import ImageOptions, Unreadable, open_source
from diffratio_fast.data.sources.base import decode_image, decode_moments
from diffratio_fast.errors import UserError
from diffratio_fast.networks.published_pickles import published_network
from diffratio_fast.runs.log import MetricsLog
from diffratio_fast.storage import checkpoints, pickles
from diffratio_fast.storage.reading import DAMAGE, parse_json, read_npz

SMALL = ImageOptions(resolution=16, max_pixels=1 << 20, max_bytes=1 << 24)
AS_STORED = ImageOptions(max_pixels=1 << 20, max_bytes=1 << 24)
UNPACKED = 1 << 24


@dataclass(frozen=True)
class Target:
    """``run`` reads ``data`` (from a file in the folder, if it needs one); only ``allowed`` may be raised."""

    run: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    allowed: tuple[type[BaseException], ...] = (UserError,)
    words: tuple[bytes, ...] = field(default=())
    """Inserted by mutations."""


def written(folder: Path, name: str, data: bytes) -> Path:
    path = folder / name
    path.write_bytes(data)
    return path


# ------------------------------------------------------------------------------------------ pickles


def pickle_seeds() -> list[bytes]:
    content = {"ema": {"w": np.ones((2, 3), np.float32), "n": [1, 2.5, None, True], "s": {"a", b"b"}}}
    return [pickle.dumps(content, protocol) for protocol in (0, 2, 4, 5)]


def run_pickle(data: bytes, folder: Path) -> object:
    content = pickles.read(io.BytesIO(data))
    for value in content.values() if isinstance(content, dict) else [content]:
        for use in (published_network, pickles.array, pickles.tensor):
            try:
                use(value)
            except ValueError:
                continue
    return content


def torch_seeds() -> list[bytes]:
    found = []
    for packed in (True, False):
        stream = io.BytesIO()
        torch.save({"w": torch.ones(3)}, stream, _use_new_zipfile_serialization=packed)
        found.append(stream.getvalue())
    return found


# ----------------------------------------------------------------------------------------- networks


def network_seeds() -> list[bytes]:
    arguments = {"shape": [1, 4, 4], "classes": 2, "latent_size": 2, "width": 4, "depth": 1}
    scaling = {"mean": [4.0], "std": [6.0], "low": 0.0, "high": 16.0}
    about = {
        "role": "generator", "architecture": "mlp", "arguments": arguments, "training": {},
        "data": {"name": "digits", "class_names": ["0", "1"], "scaling": scaling, "vae": None},
    }  # fmt: skip
    network = networks.build("generator", "mlp", arguments)
    metadata = {"format": "diffratio_fast.network.1", "about": json.dumps(about)}
    return [safetensors.torch.save(network.state_dict(), metadata)]


# -------------------------------------------------------------------------------------------- JSON


def manifest_seeds() -> list[bytes]:
    content = {
        "format": "diffratio_fast.shards", "version": 1, "name": "a", "kind": "image", "shape": [1, 2, 2],
        "class_names": ["x", "y"], "scaling": {"mean": [4.0], "std": [2.0], "low": 0.0, "high": 255.0},
        "statistics": {name: [1.0] for name in ("mean", "std", "min", "max")},
        "splits": {"train": [0, 3], "validation": [3, 4], "test": [4, 5]},
        "shards": [{"file": "shard-00000.bin", "records": 5, "size": 20, "sha256": "0"}],
        "sha256": {"labels.npy": "0", "checksums.npy": "0"}, "vae": None, "source": {}, "dtype": "uint8",
        "records": 5, "record_bytes": 4,
    }  # fmt: skip
    return [json.dumps(content, indent=1).encode()]


def index_seeds() -> list[bytes]:
    index: dict[str, Any] = {
        "format": checkpoints.FORMAT, "step": 1, "seconds": 1.5, "best": {},
        "files": {"a.safetensors": {"bytes": 0, "xxh3_128": "99aa06d3014798d86001c324468d497f"}},
    }  # fmt: skip
    return [json.dumps(index | {"digest": checkpoints.digest_of_index(index)}).encode()]


def run_index(data: bytes, folder: Path) -> object:
    where = folder / "step-00000001"
    where.mkdir(exist_ok=True)
    (where / "a.safetensors").write_bytes(b"")
    written(where, checkpoints.INDEX, data)
    try:  # with a matching digest, as in a forged file
        index = parse_json(data)
        index.pop("digest", None)
        forged = index | {"digest": checkpoints.digest_of_index(index)}
        written(where, checkpoints.INDEX, json.dumps(forged).encode())
    except (UnicodeEncodeError, *DAMAGE):
        pass
    return checkpoints.read_index(where)


# ------------------------------------------------------------------------------------------ sources


def image(kind: str, mode: str = "RGB") -> bytes:
    stream = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    Image.fromarray(pixels).convert(mode).save(stream, kind)
    return stream.getvalue()


def image_seeds() -> list[bytes]:
    kinds = ["PNG", "JPEG", "BMP", "PPM", "GIF", "TIFF", "WEBP"]
    return [*(image(kind) for kind in kinds), image("PNG", "L"), image("PNG", "P"), image("TIFF", "1")]


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def zip_seeds() -> list[bytes]:
    found = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            archive.writestr(zipfile.ZipInfo("a/b.png"), image("PNG"))
            archive.writestr(zipfile.ZipInfo("dataset.json"), '{"labels": [["a/b.png", 1]]}')
        found.append(stream.getvalue())
    return found


def tar_seeds() -> list[bytes]:
    found = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
            files = {"a.png": image("PNG"), "a.cls": b"3", "n/" * 60 + "a.json": b'{"label": 1}'}
            for name, content in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
        found.append(stream.getvalue()[:8192])
    return found


def read_all(path: Path, kind: str, options: ImageOptions = SMALL) -> object:
    source = open_source(path, kind, options)
    for number in range(min(len(source), 3)):
        try:
            source.read(number)
        except Unreadable:
            continue
    return source.shape


def idx_seeds() -> list[bytes]:
    content = struct.pack(">IIII", 0x803, 2, 3, 3) + bytes(range(18))
    return [content, gzip.compress(content, mtime=0)]


def run_idx(data: bytes, folder: Path) -> object:
    labels = struct.pack(">II", 0x801, 2) + bytes([0, 1])
    for split in ("train", "t10k"):
        written(folder, f"{split}-labels-idx1-ubyte", labels)
        written(folder, f"{split}-images-idx3-ubyte", data)
    return read_all(folder, "idx", AS_STORED)


def run_cifar(data: bytes, folder: Path) -> object:
    return read_all(written(folder, "c.tar.gz", data), "cifar10", AS_STORED)


def cifar_seeds() -> list[bytes]:
    return [gzip.compress(seed, mtime=0) for seed in tar_seeds()]


# ------------------------------------------------------------------------------------------- others


def yaml_seeds() -> list[bytes]:
    return [b"preset: digits\nsteps: 20\ngenerator_lr: 1e-3\nema_std: null\n", b"{steps: [1, {a: b}]}"]


def npz_seeds() -> list[bytes]:
    found = []
    for save in (np.savez, np.savez_compressed):
        stream = io.BytesIO()
        save(stream, mu=np.ones(3), sigma=np.eye(3), about=np.array("{}"))
        found.append(stream.getvalue())
    return found


def log_seeds() -> list[bytes]:
    return [b'{"step": 1, "loss": 0.5}\n{"step": 2, "sigma": [1, null]}\n{"step": 3, "lo']


YAML = (b"!!python/name:os.system ", b"&a ", b"*a", b"<<: ", b"- ", b"? ", b"2001-01-01", b".inf", b"!!set ")
JSON = (b"null", b"true", b"1e999", b"-1", b"[", b"{}", b'""', b"\\ud800", b"99999999999999999999", b"NaN")
PICKLE = (b"2\x86", b")}(", b"u", b"h\x00", b"ctorch\nSize\n", b"R", b"b", b"\x90", b"\x8f", b"\x91", b"0")
TARGETS: dict[str, Target] = {
    "pickle": Target(run_pickle, pickle_seeds, (ValueError,), PICKLE),
    "torch": Target(
        lambda data, _: pickles.check_torch_file(io.BytesIO(data)), torch_seeds, (ValueError,), PICKLE
    ),
    "safetensors": Target(
        lambda data, folder: networks.load(written(folder, "n.safetensors", data), "generator"),
        network_seeds,
        words=(*JSON, b'"F32"', b'"BF16"', b'"shape":[', b'"data_offsets":[0,4]'),
    ),
    "manifest": Target(
        lambda data, folder: (written(folder, "manifest.json", data), read_manifest(folder)), manifest_seeds,
        words=JSON,
    ),
    "index": Target(run_index, index_seeds, (UserError, checkpoints.Damaged), JSON),
    "json": Target(lambda data, _: parse_json(data), manifest_seeds, (ValueError,), JSON),
    "yaml": Target(
        lambda data, folder: read_yaml(TrainConfig, written(folder, "c.yaml", data)), yaml_seeds, words=YAML
    ),
    "image": Target(lambda data, _: decode_image(data, SMALL, "a"), image_seeds, (Unreadable,)),
    "moments": Target(
        lambda data, _: decode_moments(data, None, "a"), lambda: [npy(np.ones((4, 2, 2), np.float32))],
        (Unreadable,),
    ),
    "zip": Target(
        lambda data, folder: read_all(written(folder, "a.zip", data), "zip"), zip_seeds, words=(b"PK",)
    ),
    "tar": Target(lambda data, folder: read_all(written(folder, "a.tar", data), "webdataset"), tar_seeds),
    "idx": Target(run_idx, idx_seeds),
    "cifar": Target(run_cifar, cifar_seeds),
    "npz": Target(
        lambda data, folder: read_npz(written(folder, "a.npz", data), limit=UNPACKED), npz_seeds, DAMAGE
    ),
    "log": Target(
        lambda data, folder: MetricsLog(written(folder, "m.jsonl", data), 2, lambda line: None).close(),
        log_seeds, (), JSON,
    ),
}  # fmt: skip
