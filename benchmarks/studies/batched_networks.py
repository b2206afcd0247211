"""Many small networks trained in one batch: every weight has a leading axis of independent trainings.

The sum of the losses gives each training its own gradient, and Adam is elementwise, so the trainings are
independent. One large matrix product replaces S small ones.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import silu

from diffratio_fast.data.scaling import SIGMA_DATA

FEATURES = 16
CONDITION = 32


class BatchedNetworks:
    """S residual networks with different weights: x [S, N, d] and sigma [S, N] to [S, N, outputs].

    Like ``networks.mlp.MLPRatio``: the input is scaled by c_in, the noise level sets a bias in every layer,
    and the initial output is zero.
    """

    def __init__(
        self, count: int, dimensions: int, outputs: int, width: int, depth: int, generator: torch.Generator
    ) -> None:
        def weight(fan_in: int, fan_out: int, gain: float) -> Tensor:
            std = gain / math.sqrt(fan_in)
            return (torch.randn(count, fan_in, fan_out, generator=generator) * std).requires_grad_()

        def bias(size: int) -> Tensor:
            return torch.zeros(count, 1, size, requires_grad=True)

        exponents = torch.linspace(math.log(0.25), math.log(4.0), FEATURES)
        self.frequencies = exponents.exp() * (math.pi / 2)
        self.condition = weight(2 * FEATURES, CONDITION, 1.0), bias(CONDITION)
        self.biases = weight(CONDITION, width * depth, 1.0), bias(width * depth)
        self.first = weight(dimensions, width, 2.0), bias(width)
        self.blocks = [(weight(width, width, 1.0), bias(width)) for _ in range(depth)]
        self.last = weight(width, outputs, 0.0), bias(outputs)
        self.depth, self.width = depth, width

    def parameters(self) -> list[Tensor]:
        layers = [self.condition, self.biases, self.first, *self.blocks, self.last]
        return [tensor for layer in layers for tensor in layer]

    def copy_(self, other: BatchedNetworks) -> None:
        """Copy the weights of ``other``."""
        with torch.no_grad():
            for mine, theirs in zip(self.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)

    def requires_grad_(self, needed: bool) -> None:
        for parameter in self.parameters():
            parameter.requires_grad_(needed)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        angle = sigma.log()[..., None] * self.frequencies
        features = torch.cat((angle.cos(), angle.sin()), -1) * math.sqrt(2)
        biases = _linear(self.biases, silu(_linear(self.condition, features))).chunk(self.depth, -1)
        h = _linear(self.first, x * (sigma**2 + SIGMA_DATA**2).rsqrt()[..., None])
        for block, bias in zip(self.blocks, biases, strict=True):
            h = h + silu(_linear(block, h) + bias)
        return _linear(self.last, h)


def _linear(layer: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    return torch.baddbmm(layer[1], x, layer[0])


class Ratios(BatchedNetworks):
    """S ratio networks: log ratio [S, N]."""

    def __init__(self, count: int, dimensions: int, width: int, depth: int, generator: torch.Generator):
        super().__init__(count, dimensions, 1, width, depth, generator)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        return super().__call__(x, sigma)[..., 0]

    def slope(self, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """(log ratio [S, N], its gradient in x [S, N, d]), detached."""
        x = x.detach().requires_grad_()
        log_ratio = self(x, sigma)
        (slope,) = torch.autograd.grad(log_ratio.sum(), x)
        return log_ratio.detach(), slope


class EnergyRatios(Ratios):
    """S ratio networks with an energy head: l = f + <c_in x, F> / sqrt(d), as ``networks.mlp.MLPRatio``."""

    def __init__(self, count: int, dimensions: int, width: int, depth: int, generator: torch.Generator):
        BatchedNetworks.__init__(self, count, dimensions, 1 + dimensions, width, depth, generator)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        out = BatchedNetworks.__call__(self, x, sigma)
        scaled = x * (sigma**2 + SIGMA_DATA**2).rsqrt()[..., None]
        return out[..., 0] + (scaled * out[..., 1:]).sum(-1) / math.sqrt(x.shape[-1])


class Denoisers(BatchedNetworks):
    """S denoisers with the preconditioning of Karras et al. 2022 (Table 1): x0 [S, N, d] from x_sigma."""

    def __init__(self, count: int, dimensions: int, width: int, depth: int, generator: torch.Generator):
        super().__init__(count, dimensions, dimensions, width, depth, generator)

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        total = (sigma**2 + SIGMA_DATA**2)[..., None]
        sigma = sigma[..., None]
        out = super().__call__(x, sigma[..., 0])
        return SIGMA_DATA**2 / total * x + sigma * SIGMA_DATA * total.rsqrt() * out


def parameter_count(dimensions: int, outputs: int, width: int, depth: int) -> int:
    """Number of trainable parameters of one network."""
    condition = (2 * FEATURES + 1) * CONDITION + (CONDITION + 1) * width * depth
    return condition + (dimensions + 1) * width + depth * (width + 1) * width + (width + 1) * outputs


def matched_width(dimensions: int, outputs: int, depth: int, parameters: int) -> int:
    """The largest width of a network with at most ``parameters`` parameters."""
    width = 1
    while parameter_count(dimensions, outputs, width + 1, depth) <= parameters:
        width += 1
    return width
