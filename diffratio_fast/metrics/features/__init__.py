"""Feature extractors: map uint8 images to feature vectors for the distances.

An extractor is one row of ``EXTRACTORS`` and one network. All have the same uint8 input. ``extract`` runs
them in batches of a fixed size, so that features do not depend on the batches of the caller.
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
from diffratio_fast.metrics.features.random import load_random

__all__ = ["EXTRACTORS", "Extractor", "FeatureSet", "extract", "load_extractor"]

EXTRACTORS: dict[str, Callable[[Path | None, tuple[int, int, int]], Extractor]] = {
    "inception": load_inception,
    "dinov2": load_dinov2,
    "efficientnet-lite0": load_efficientnet_lite0,
    "pixels": load_pixels,
    "random": load_random,
}
"""Arguments: file or directory of the weights (None: the default location), and the shape of an image."""


def load_extractor(
    name: str, weights: Path | None, shape: tuple[int, int, int], device: torch.device
) -> Extractor:
    """Load the extractor ``name`` for images of ``shape`` (C, H, W) with 1 or 3 channels."""
    if name not in EXTRACTORS:
        raise UserError(f"--features {name}: unknown; expected one of {', '.join(EXTRACTORS)}")
    if shape[0] not in (1, 3):
        raise UserError(f"images of {shape[0]} channels; feature extractors expect gray or RGB images")
    extractor = EXTRACTORS[name](weights, shape)
    extractor.network.eval().requires_grad_(False).to(device)
    return extractor


def extract(
    extractor: Extractor,
    batches: Iterable[Tensor],
    keep: npt.NDArray[np.int64] | None = None,
    progress: Callable[[int], None] = lambda images: None,
) -> FeatureSet:
    """Extract the features of all images in ``batches``, uint8 [b, C, H, W] with any b.

    The moments are those of all images. Features and logits are stored for the image numbers in ``keep``
    only (sorted; None means all).
    """
    features = FeatureSet(extractor)
    kept = 0
    with torch.inference_mode(), _repeatable():
        for block, count in _batches(batches, extractor.batch):
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


def _batches(batches: Iterable[Tensor], size: int) -> Iterator[tuple[Tensor, int]]:
    """Yield (images in batches of ``size``, number of valid images); zeros pad the last batch."""
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
    """Context: convolutions in full float32 with deterministic algorithms."""
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
