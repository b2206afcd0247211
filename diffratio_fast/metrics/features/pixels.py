"""Pixels as features: images are downsampled to at most ``MAX_DIMENSION`` numbers."""

from __future__ import annotations

import math
from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features.base import Extractor
from diffratio_fast.metrics.pixels import MAX_DIMENSION


class _Pixels(nn.Module):
    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        x = images.double()
        if images.shape[-2:] != self.size:
            x = F.adaptive_avg_pool2d(x, self.size)
        return (x / 127.5 - 1).flatten(1), None


def load_pixels(weights: Path | None, shape: tuple[int, int, int]) -> Extractor:
    """Pixels in [-1, 1]; larger images are averaged over the smallest sufficient boxes."""
    if weights is not None:
        raise UserError("--weights: --features pixels has no weights; omit --weights")
    channels, height, width = shape
    factor = 1
    while channels * math.ceil(height / factor) * math.ceil(width / factor) > MAX_DIMENSION:
        factor += 1
    size = (math.ceil(height / factor), math.ceil(width / factor))
    identity = {"name": "pixels", "weights_sha256": None, "size": [channels, *size], "resize": "box"}
    return Extractor(_Pixels(size), channels * size[0] * size[1], identity, batch=256, color=False)
