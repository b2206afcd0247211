"""Small data sets for the tests of the data package."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffratio_fast import prepare


def run_prepare(*arguments: object) -> int:
    return prepare.main([str(a) for a in arguments]) or 0


def picture(seed: int, height: int = 8, width: int = 8) -> np.ndarray:
    """A random image, uint8 [H, W, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def image_folder(root: Path, classes: int = 3, per_class: int = 20, size: int = 8) -> Path:
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            (root / f"class{c}" / f"{i:03d}.png").write_bytes(png(picture(1000 * c + i, size, size)))
    return root


def prepared(root: Path) -> Path:
    """A prepared data set of 60 random images in nine shards."""
    destination = root / "shards"
    options = ("--shard-bytes", 192 * 7, "--workers", 2)
    assert run_prepare(image_folder(root / "images"), destination, *options) == 0
    return destination


def moments(seed: int, channels: int = 4, side: int = 4) -> np.ndarray:
    """Random latent moments, float32 [2 * channels, side, side]."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(1, 3, (channels, side, side)), rng.uniform(0.01, 0.2, (channels, side, side))
    return np.concatenate([mean, std]).astype(np.float32)


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def edm_zip(path: Path, members: dict[str, bytes], labels: list[int] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        entries = None if labels is None else [[n, y] for n, y in zip(members, labels, strict=True)]
        archive.writestr("dataset.json", json.dumps({"labels": entries}))
    return path


def latent_shards(root: Path, *options: object) -> Path:
    members = {f"00000/img-mean-std-{i:08d}.npy": npy(moments(i)) for i in range(40)}
    archive = edm_zip(root / "latents.zip", members, [i % 4 for i in range(40)])
    assert run_prepare(archive, root / "latents", *options) == 0
    return root / "latents"


def tree(directory: Path) -> dict[str, str]:
    """sha256 of every file below a directory."""
    return {
        p.relative_to(directory).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }
