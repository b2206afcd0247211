"""Small pieces that the networks share."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffratio_fast import ops


class Linear(nn.Linear):
    """A linear layer that states its initial scale: weights of std gain / sqrt(fan_in), bias zero."""

    def __init__(self, features_in: int, features_out: int, *, gain: float = 1.0, bias: bool = True) -> None:
        self.gain = gain
        super().__init__(features_in, features_out, bias=bias)

    def reset_parameters(self) -> None:
        """Left to ``initialise``: the draws come from the noise contract, not from torch's generator."""

    def initial_std(self) -> float:
        return self.gain / math.sqrt(self.in_features)


class Embedding(nn.Embedding):
    """A table of class vectors whose entries start normal with std ``gain``."""

    def __init__(self, count: int, features: int, *, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(count, features)

    def reset_parameters(self) -> None:
        """Left to ``initialise``."""

    def initial_std(self) -> float:
        return self.gain


class Weight(nn.Module):
    """A bare tensor (a stack of matrices, say) whose entries start normal with std gain / sqrt(fan_in)."""

    def __init__(self, shape: Sequence[int], *, fan_in: int, gain: float = 1.0) -> None:
        super().__init__()
        self.std = gain / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.zeros(*shape))

    def initial_std(self) -> float:
        return self.std


@torch.no_grad()
def initialise(network: nn.Module, seed: int, stream: int) -> None:
    """Draw the weights of every ``Linear``, ``Embedding`` and ``Weight``; all else starts as a constant.

    Weights are normals of the noise contract (purpose ``INITIALISATION``; the layer's ordinal in the place
    of the sample index, ``stream`` in that of the draw: one for each network of a run), so that a seed gives
    the same network on every device and torch version.
    """
    rng = ops.make_rng(seed, 0)
    layers = [module for module in network.modules() if isinstance(module, (Linear, Embedding, Weight))]
    for ordinal, layer in enumerate(layers):
        draws = ops.normal(
            rng, torch.tensor([ordinal]), layer.weight.shape, ops.Purpose.INITIALISATION, draw=stream
        )
        layer.weight.copy_(draws[0].double() * layer.initial_std())
        if isinstance(layer, Linear) and layer.bias is not None:
            layer.bias.zero_()


class FourierFeatures(nn.Module):
    """[cos, sin] of log sigma [N] at ``count`` log-spaced frequencies: [N, size], entries of unit variance.

    ``low`` and ``high`` are frequencies in cycles per four nats of log sigma.
    """

    frequencies: Tensor

    def __init__(self, count: int, *, low: float, high: float) -> None:
        super().__init__()
        self.size = 2 * count
        exponents = torch.linspace(math.log(low), math.log(high), count)
        self.register_buffer("frequencies", exponents.exp() * (math.pi / 2), persistent=False)

    def forward(self, log_sigma: Tensor) -> Tensor:
        angle = log_sigma[:, None] * self.frequencies
        return torch.cat((angle.cos(), angle.sin()), dim=1) * math.sqrt(2)
