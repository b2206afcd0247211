"""Random features: statistics of fixed random filters, for runs without a trained feature network.

They see texture, color and coarse layout, and no objects. Distances on them compare snapshots of one run or
runs on one data set; they are no published metric.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast import ops
from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features.base import Extractor

FILTERS = (64, 128)
KERNELS = (5, 3)
SCALES = 2
LAYOUT = 4
"""The image itself is averaged over a grid of so many boxes a side."""
SEED = 0


class RandomFeatures(nn.Module):
    """Features [b, dimension] of images [b, C, H, W] on a scale of about [-1, 1].

    At each of two scales (the image, and the image halved) two convolutions with fixed weights and ReLU; of
    either layer's maps the mean and the standard deviation over positions. Beside them the image averaged
    over 4 x 4 boxes. Weights are drawn by the noise contract, so they are the same on every machine.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dimension = SCALES * 2 * sum(FILTERS) + channels * LAYOUT**2
        rng = ops.make_rng(SEED, 0, "cpu")
        wide = channels
        for layer, (filters, kernel) in enumerate(zip(FILTERS, KERNELS, strict=True)):
            shape = (filters, wide, kernel, kernel)
            drawn = ops.normal(rng, torch.tensor([layer]), shape, ops.Purpose.INITIALIZATION)[0]
            self.register_buffer(f"filters_{layer}", drawn * (2 / (wide * kernel**2)) ** 0.5)
            wide = filters

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        found = [F.adaptive_avg_pool2d(x, LAYOUT).flatten(1)]
        for scale in range(SCALES):
            maps = x
            for layer in range(len(FILTERS)):
                weight: Tensor = getattr(self, f"filters_{layer}")
                maps = F.relu(F.conv2d(maps, weight, padding=weight.shape[-1] // 2))
                found += [maps.mean((2, 3)), maps.std((2, 3), correction=0)]
                if layer == 0 and min(maps.shape[2:]) > 1:
                    maps = F.avg_pool2d(maps, 2, ceil_mode=True)
            if scale + 1 < SCALES:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
        return torch.cat(found, 1)


class _OfPixels(nn.Module):
    def __init__(self, network: RandomFeatures) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        return self.network(images.float() / 127.5 - 1), None


def load_random(weights: Path | None, shape: tuple[int, int, int]) -> Extractor:
    """Random features of uint8 images of ``shape``, gray or RGB."""
    if weights is not None:
        raise UserError("--weights: --features random has no weights; omit --weights")
    network = RandomFeatures(shape[0])
    identity = {"name": "random", "weights_sha256": None, "size": list(shape), "resize": "none"}
    return Extractor(_OfPixels(network), network.dimension, identity, batch=128, color=False)
