"""Read and write ``manifest.json``, the index of a directory of shards. Every field is checked.

``docs/data.md`` describes the format. This module is its only reader and writer.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffratio_fast.data.dataset import SPLITS
from diffratio_fast.data.scaling import LATENT_SCALINGS, Scaling, Vae
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, one_line, parse_json

FORMAT = "diffratio_fast.shards"
VERSION = 1
RESTORE = "restore it or prepare the data set again"
MANIFEST = "manifest.json"
LABELS = "labels.npy"
CHECKSUMS = "checksums.npy"
RECORD_LIMIT = 1 << 28
"""Maximum bytes per record."""

DTYPES = {"image": "uint8", "latent_moments": "float16"}
"""Record kinds and their dtype: pixels, or the mean ‖ standard deviation of a latent."""


@dataclass(frozen=True)
class Shard:
    """A file of ``records`` records and ``size`` bytes."""

    file: str
    records: int
    size: int
    sha256: str


@dataclass(frozen=True)
class Statistics:
    """Per-channel statistics of the training records, in the records' units."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    min: tuple[float, ...]
    max: tuple[float, ...]


@dataclass(frozen=True)
class Manifest:
    """The checked content of ``manifest.json``; ``splits`` maps a name to its records [first, end)."""

    name: str
    kind: str
    shape: tuple[int, int, int]
    class_names: tuple[str, ...]
    scaling: Scaling
    statistics: Statistics
    splits: dict[str, tuple[int, int]]
    shards: tuple[Shard, ...]
    sha256: dict[str, str]
    """Digests of the two index files, ``labels.npy`` and ``checksums.npy``."""
    vae: Vae | None = None
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(DTYPES[self.kind]).newbyteorder("<")

    @property
    def record_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def records(self) -> int:
        return sum(shard.records for shard in self.shards)

    def to_json(self) -> str:
        """The text of ``manifest.json``: the same bytes for the same content."""
        content = {"format": FORMAT, "version": VERSION} | asdict(self)
        content |= {"dtype": DTYPES[self.kind], "records": self.records, "record_bytes": self.record_bytes}
        return json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def read_manifest(directory: str | os.PathLike[str]) -> Manifest:
    """Read and check ``directory/manifest.json``.

    Raises ``UserError`` if the file is missing, damaged, inconsistent, or of another format version.
    """
    path = Path(directory) / MANIFEST
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected a finished data set of `python -m diffratio_fast.prepare`; "
            "prepare it, or rerun an interrupted prepare"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); {RESTORE}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UserError(f"{path}: not a manifest of {FORMAT}")
    if content.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {content.get('version')}; expected version {VERSION}; "
            "upgrade diffratio_fast, or prepare the data set again with this version"
        )
    try:
        manifest = _parse(content)
    except DAMAGE as error:
        raise UserError(f"{path}: damaged ({one_line(error)}); {RESTORE}") from None
    _check_scaling(path, manifest)
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    """The manifest in a JSON object; raises KeyError, TypeError or ValueError if the object is invalid."""
    kind = content["kind"]
    _require(kind in DTYPES, f"unknown kind {kind!r}")
    _require(content["dtype"] == DTYPES[kind], f"dtype {content['dtype']!r} with kind {kind!r}")
    channels, height, width = (_count(n) for n in content["shape"])
    _require(min(channels, height, width) > 0, "empty shape")
    latent = kind == "latent_moments"
    _require(not latent or channels % 2 == 0, "latent moments need an even number of channels")
    _require((content["vae"] is not None) == latent, "vae must be set for latents and null for images")
    shards = tuple(
        Shard(_plain_name(s["file"]), _count(s["records"]), _count(s["size"]), str(s["sha256"]))
        for s in content["shards"]
    )
    manifest = Manifest(
        name=str(content["name"]),
        kind=kind,
        shape=(channels, height, width),
        class_names=tuple(str(n) for n in content["class_names"]),
        scaling=Scaling.parse(content["scaling"]),
        statistics=Statistics(*(_numbers(content["statistics"][k]) for k in ("mean", "std", "min", "max"))),
        splits={s: (_count(content["splits"][s][0]), _count(content["splits"][s][1])) for s in SPLITS},
        shards=shards,
        sha256={f: str(content["sha256"][f]) for f in (LABELS, CHECKSUMS)},
        vae=Vae(str(content["vae"]["name"]), str(content["vae"]["sha256"])) if latent else None,
        source=dict(content["source"]),
    )
    _require(manifest.record_bytes == content["record_bytes"], "record_bytes contradicts shape and dtype")
    _require(manifest.record_bytes <= RECORD_LIMIT, f"records of {manifest.record_bytes} bytes")
    _require(manifest.records == content["records"], "the shards do not add up to the record count")
    for shard in shards:
        _require(shard.size == shard.records * manifest.record_bytes, f"size of {shard.file}")
    end = 0
    for split in SPLITS:
        _require(
            manifest.splits[split][0] == end, f"split {split} does not begin where the previous split ends"
        )
        end = manifest.splits[split][1]
    _require(end == manifest.records and manifest.splits["train"][1] > 0, "splits do not cover the records")
    _require(len(manifest.class_names) > 0, "no class names")
    scaled = channels // 2 if latent else channels
    _require(len(manifest.scaling.mean) in (1, scaled), f"scaling needs 1 or {scaled} channels")
    return manifest


def _check_scaling(path: Path, manifest: Manifest) -> None:
    name = manifest.vae.name if manifest.vae else ""
    published = LATENT_SCALINGS.get(name)
    if published is not None and published != manifest.scaling:
        raise UserError(
            f"{path}: scaling of the latents does not match their VAE {name}: mean "
            f"{list(manifest.scaling.mean)}, std {list(manifest.scaling.std)}; expected mean "
            f"{list(published.mean)}, std {list(published.std)}; prepare again with the correct --vae-name"
        )


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def _count(value: object) -> int:
    _require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 0, f"{value!r} is not a count"
    )
    assert isinstance(value, int)
    return value


def _numbers(values: list[float]) -> tuple[float, ...]:
    return tuple(float(v) for v in values)


def _plain_name(name: str) -> str:
    """Check that ``name`` is a file name without a directory part."""
    _require(name == Path(name).name and name not in ("", ".", ".."), f"{name!r} is not a plain file name")
    return name
