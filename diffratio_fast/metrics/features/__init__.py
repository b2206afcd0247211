"""Feature extractors: uint8 images to the vectors that distances are measured between.

An extractor is a table row in ``EXTRACTORS`` and a ``Network``. All take the same uint8 images, and
``extract`` runs each in blocks of a fixed size, so that features do not depend on how images arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features.base import Extractor, FeatureSet
from diffratio_fast.metrics.features.dinov2 import load_dinov2
from diffratio_fast.metrics.features.efficientnet import load_efficientnet_lite0
from diffratio_fast.metrics.features.inception import load_inception
from diffratio_fast.metrics.features.pixels import load_pixels

__all__ = ["EXTRACTORS", "Extractor", "FeatureSet", "extract", "load_extractor"]

EXTRACTORS: dict[str, Callable[[Path | None, tuple[int, int, int]], Extractor]] = {
    "inception": load_inception,
    "dinov2": load_dinov2,
    "efficientnet-lite0": load_efficientnet_lite0,
    "pixels": load_pixels,
}
"""Each takes the file or directory of weights, or None for where they usually are, and an image's shape."""


def load_extractor(
    name: str, weights: Path | None, shape: tuple[int, int, int], device: torch.device
) -> Extractor:
    """The extractor of that name for images of ``shape`` (C, H, W) with 1 or 3 channels."""
    if name not in EXTRACTORS:
        raise UserError(f"no such features: {name}; known: {', '.join(EXTRACTORS)}")
    if shape[0] not in (1, 3):
        raise UserError(f"features are of grey or RGB images, not of {shape[0]} channels")
    extractor = EXTRACTORS[name](weights, shape)
    extractor.network.eval().requires_grad_(False).to(device)
    return extractor


def extract(
    extractor: Extractor,
    batches: Iterable[Tensor],
    keep: npt.NDArray[np.int64] | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> FeatureSet:
    """Features of all images of ``batches``, uint8 [b, C, H, W] each, of any size.

    The moments are of all of them; features and logits are kept for the numbers in ``keep`` alone (sorted;
    None for all).
    """
    features = FeatureSet(extractor)
    kept = 0
    with torch.inference_mode(), _repeatable():
        for block, count in _blocks(batches, extractor.batch):
            values, logits = extractor(block)
            chosen: Any = slice(count)
            if keep is not None:
                first = features.count
                end = int(np.searchsorted(keep, first + count))
                chosen = keep[kept:end] - first
                kept = end
            features.add(values[:count], chosen, logits)
            progress(count)
    return features


def _blocks(batches: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, int]]:
    """The same images ``size`` at a time; the last block is filled up with zeros. (block, how many count)"""
    rest: Tensor | None = None
    for batch in batches:
        rest = batch if rest is None else torch.cat([rest, batch])
        while len(rest) >= size:
            yield rest[:size], size
            rest = rest[size:]
    if rest is not None and len(rest):
        filled = rest.new_zeros(size, *rest.shape[1:])
        filled[: len(rest)] = rest
        yield filled, len(rest)


def _repeatable() -> Any:
    """Convolutions in full float32, by the same algorithm every time."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
