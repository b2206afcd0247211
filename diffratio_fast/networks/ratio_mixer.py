"""RatioMixer: the ratio network of the fused operations (``ops.ratio``; docs/ratio_mixer.md)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffratio_fast import ops
from diffratio_fast.networks.layers import Embedding, FourierFeatures, Linear, Weight
from diffratio_fast.networks.mlp import is_energy
from diffratio_fast.ops.ratio import weight_shapes

MAX_TOKENS = 256


def default_patch(height: int, width: int) -> int:
    """The smallest patch size from 2 on that divides the image into at most ``MAX_TOKENS`` tokens."""
    for size in range(min(2, height, width), max(height, width) + 1):
        divides = height % size == 0 and width % size == 0
        if divides and (height // size) * (width // size) <= MAX_TOKENS:
            return size
    raise ValueError(f"no patch size divides {height} x {width} into at most {MAX_TOKENS} tokens")


class RatioMixer(nn.Module):
    """Log ratio [N] of noised images [N, C, H, W] given sigma [N] and labels int64 [N].

    ``width`` channels, ``depth`` layers of token and channel mixing, ``expansion`` times as many hidden
    units, square patches of ``patch`` pixels (None: ``default_patch``). The inputs of the fused operations
    are ``weights()`` and the result of ``conditioning``, an ordinary small module under autograd.
    """

    CONDITION = 64

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: int,
        depth: int,
        expansion: int = 2,
        patch: int | None = None,
        head: str = "scalar",
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        channels, image_height, image_width = shape
        size = default_patch(image_height, image_width) if patch is None else patch
        if size < 1 or image_height % size or image_width % size:
            raise ValueError(
                f"patches of {size} x {size} do not divide images of {image_height} x {image_width}; "
                "choose a divisor of both sides"
            )
        self.sigma_data = sigma_data
        hidden, tokens = expansion * width, (image_height // size) * (image_width // size)
        shapes = weight_shapes(tokens, width, depth, hidden, channels * size**2, is_energy(head))
        gains = {"patch": 1.4, "mix": 1.0, "up": 1.4, "down": 1.0}
        # the last axis of a weight is its fan-in; weights without a gain are initialized to zero
        self.parts = nn.ModuleDict(
            {name: Weight(s, fan_in=s[-1], gain=gains.get(name, 0.0)) for name, s in shapes.items()}
        )
        self.fourier = FourierFeatures(16, low=0.25, high=4.0)
        self.noise = Linear(self.fourier.size, self.CONDITION)
        self.embed = Embedding(classes, self.CONDITION)
        self.biases = Linear(self.CONDITION, width + depth * hidden)

    def weights(self, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The ``weights`` argument of the fused operations, rounded to ``dtype`` if given."""
        parts = cast("Iterable[Weight]", self.parts.values())
        return [part.weight if dtype is None else part.weight.to(dtype) for part in parts]

    def conditioning(self, sigma: Tensor, labels: Tensor) -> Tensor:
        """Conditioning vectors [*sigma.shape, D] for sigma [N] or [N, K] and labels int64 [N]."""
        noise = self.noise(self.fourier(sigma.reshape(-1).log())).reshape(*sigma.shape, self.CONDITION)
        label = self.embed(labels).reshape(-1, *[1] * (sigma.dim() - 1), self.CONDITION)
        return self.biases(silu(noise + label))

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return ops.log_ratio(
            self.weights(), noised, sigma, self.conditioning(sigma, labels), sigma_data=self.sigma_data
        )
