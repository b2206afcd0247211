"""Reference statistics of a split of a data set: computed, saved or published."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from diffratio_fast.data.sampler import permutation
from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features import Extractor, FeatureSet, extract
from diffratio_fast.metrics.frechet import Moments
from diffratio_fast.metrics.images import DataSetImages, Images
from diffratio_fast.storage import pickles
from diffratio_fast.storage.reading import (
    DAMAGE,
    UNPACKED_LIMIT,
    one_line,
    open_regular,
    parse_json,
    read_npz,
)
from diffratio_fast.storage.writing import replacing, sha256_of_file

KEEP = 50_000
"""Maximum number of features kept for a set of images; the moments are of all images."""
QUANTIZATION = "uint8, rounded to nearest"
FORMAT = "diffratio_fast.reference.1"
PUBLISHED_KEYS = {"inception": "fid", "dinov2": "fd_dinov2"}
"""Keys of the statistics of an extractor in EDM2's pickles."""


@dataclass
class Measured:
    """Images and their features; ``labels`` int64 are those of the kept features."""

    about: dict[str, Any]
    set: FeatureSet
    labels: npt.NDArray[np.int64] | None
    class_counts: npt.NDArray[np.int64] | None


def kept_numbers(count: int, keep: int = KEEP) -> npt.NDArray[np.int64]:
    """A fixed random choice of ``keep`` of ``count`` numbers (all, if there are fewer), sorted."""
    return np.sort(permutation(0, 0, count)[:keep])


def measure(
    images: Images,
    extractor: Extractor,
    *,
    watch: Callable[[Iterator[Tensor]], Iterator[Tensor]] = lambda batches: batches,
    progress: Callable[[int], None] = lambda n: None,
) -> Measured:
    """Extract the features of all images and the sha256 of their pixels; ``watch`` receives the batches."""
    digest = hashlib.sha256(repr(images.shape).encode())

    def hashed() -> Iterator[Tensor]:
        for batch in images.batches():
            digest.update(batch.numpy().tobytes())
            yield batch

    keep = kept_numbers(images.count)
    features = extract(extractor, watch(hashed()), keep, progress)
    about = images.about | {"count": images.count, "shape": list(images.shape)}
    about |= {"sha256": digest.hexdigest(), "quantisation": QUANTIZATION}  # words: ok
    labels = images.labels
    counts = None if labels is None else np.bincount(labels)
    return Measured(about, features, None if labels is None else labels[keep], counts)


@dataclass
class Reference:
    """Moments of ``count`` images; other fields are None if unknown, as for published statistics.

    ``features`` float32 [kept, D] and ``labels`` int64 [kept] belong to a random choice of at most ``KEEP``
    images. ``held_out`` are features of real images of another split, for the floors.
    """

    about: dict[str, Any]
    moments: Moments
    count: int | None = None
    features: npt.NDArray[np.float32] | None = None
    labels: npt.NDArray[np.int64] | None = None
    class_names: list[str] | None = None
    class_counts: npt.NDArray[np.int64] | None = None
    held_out: npt.NDArray[np.float32] | None = None
    held_out_name: str = ""

    @property
    def shape(self) -> tuple[int, int, int] | None:
        shape = self.about.get("shape")
        return None if shape is None else (shape[0], shape[1], shape[2])


def reference_of(
    images: DataSetImages, extractor: Extractor, progress: Callable[[int], None] = lambda n: None
) -> Reference:
    """Compute the statistics of a split of at least two images."""
    measured = measure(images, extractor, progress=progress)
    names = list(images.data.class_names)
    assert measured.class_counts is not None
    counts = np.pad(measured.class_counts, (0, len(names) - len(measured.class_counts)))
    features = measured.set
    return Reference(
        measured.about, features.moments, images.count, features.features, measured.labels, names, counts
    )


def require_enough(count: int, extractor: Extractor, what: str) -> None:
    """Raise ``UserError`` for fewer images than a covariance of full rank needs."""
    if count <= extractor.dimension:
        raise UserError(
            f"{what}: {count} images; the covariance of the {extractor.dimension} features of "
            f"{extractor.name} "
            f"needs at least {extractor.dimension + 1}; add images, or omit frechet from --metrics"
        )


def save_reference(path: Path, reference: Reference, extractor: Extractor) -> None:
    """Write an npz for ``load_reference``; ``mu`` and ``sigma`` have the names and dtypes of EDM."""
    about = {
        "format": FORMAT,
        "about": reference.about,
        "extractor": extractor.identity,
        "count": reference.count,
        "class_names": reference.class_names,
        "held_out": reference.held_out_name,
    }
    arrays: dict[str, Any] = {"mu": reference.moments.mean, "sigma": reference.moments.covariance}
    for name in ("features", "labels", "class_counts", "held_out"):
        if (value := getattr(reference, name)) is not None:
            arrays[name] = value
    with replacing(path) as file:
        np.savez(file, about=np.array(json.dumps(about)), **arrays)


def saved_shape(path: Path, limit: int = UNPACKED_LIMIT) -> tuple[int, int, int] | None:
    """Shape (C, H, W) of the images of saved statistics; None if not stored."""
    try:
        about = read_npz(path, {"about"}, limit=limit)["about"]
        channels, height, width = parse_json(str(about))["about"]["shape"]
        return channels, height, width
    except DAMAGE:
        return None


def load_reference(path: Path, extractor: Extractor, limit: int = UNPACKED_LIMIT) -> Reference:
    """Statistics that ``save_reference`` wrote, EDM's ``.npz`` (mu, sigma) or EDM2's ``.pkl``.

    Arrays of an ``.npz`` take at most ``limit`` bytes of memory together.

    Damaged ones, and those of another extractor, are a ``UserError``. Nothing in a pickle is run.
    """
    try:
        arrays = _read_pickle(path, extractor) if path.suffix == ".pkl" else _read_npz(path, limit)
        about = parse_json(str(arrays.pop("about"))) if "about" in arrays else {}
        moments = _moments(arrays, extractor)
        reference = Reference(
            {"kind": "statistics", "path": str(path)}
            | about.get("about", {})
            | {"file_sha256": sha256_of_file(path)},
            moments,
            about.get("count"),
            arrays.get("features"),
            arrays.get("labels"),
            about.get("class_names"),
            arrays.get("class_counts"),
            arrays.get("held_out"),
            about.get("held_out", ""),
        )
        _check_kept(reference, extractor)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except DAMAGE as error:
        raise UserError(f"{path}: damaged, or not reference statistics ({one_line(error)})") from None
    if not about and extractor.name not in PUBLISHED_KEYS:
        raise UserError(
            f"{path}: no feature name, so its features are those of the FID network; "
            "use --features inception, or save the reference with these features"
        )
    if about and about["extractor"] != extractor.identity:
        raise UserError(
            f"{path}: statistics of {_described(about['extractor'])}; expected statistics of "
            f"{_described(extractor.identity)}"
        )
    return reference


def _described(identity: dict[str, Any]) -> str:
    weights = identity.get("weights_sha256")
    return str(identity.get("name")) + (f" (weights {weights[:12]})" if weights else "")


def _read_npz(path: Path, limit: int) -> dict[str, Any]:
    arrays = read_npz(path, limit=limit)
    if not {"mu", "sigma"} <= set(arrays):
        raise ValueError("no mu and sigma")
    return arrays


def _read_pickle(path: Path, extractor: Extractor) -> dict[str, Any]:
    with open_regular(path) as file:
        content = pickles.read(file)
    key = PUBLISHED_KEYS.get(extractor.name)
    if not isinstance(content, dict) or not isinstance(content.get(key), dict):
        held = ", ".join(map(str, content)) if isinstance(content, dict) else type(content).__name__
        raise UserError(f"{path}: no statistics for {extractor.name}; it contains {ascii(held)[1:-1][:200]}")
    return {name: pickles.array(content[key][name]) for name in ("mu", "sigma")}


def _moments(arrays: dict[str, Any], extractor: Extractor) -> Moments:
    mean, covariance = (np.asarray(arrays[name], np.float64) for name in ("mu", "sigma"))
    size = extractor.dimension
    if mean.shape != (size,) or covariance.shape != (size, size):
        raise ValueError(
            f"mu {list(mean.shape)} and sigma {list(covariance.shape)}; {extractor.name} has {size} features"
        )
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError("numbers that are not finite")
    scale = float(np.abs(covariance).max())
    if np.abs(covariance - covariance.T).max() > 1e-6 * scale:
        raise ValueError("sigma is not symmetric")
    if np.linalg.eigvalsh(covariance)[0] < -1e-6 * scale * size:
        raise ValueError("sigma has negative variances")
    return Moments(mean, covariance)


def _check_kept(reference: Reference, extractor: Extractor) -> None:
    features, labels = reference.features, reference.labels
    for kept in (features, reference.held_out):
        if kept is not None and (kept.ndim != 2 or kept.shape[1] != extractor.dimension):
            raise ValueError(f"features {list(kept.shape)}")
        if kept is not None and not np.isfinite(kept).all():
            raise ValueError("features that are not finite")
    if labels is not None and (features is None or labels.shape != features.shape[:1]):
        raise ValueError(f"labels {list(labels.shape)}")
