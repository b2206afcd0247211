"""Layers and initialization shared by the networks."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffratio_fast import ops


class Draws:
    """Random numbers for the weights of one layer, from torch's generator; ``initialize`` uses a seed."""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape)

    def uniform(self, *shape: int) -> Tensor:
        """Uniform numbers in [0, 1)."""
        return torch.rand(shape)


class _SeededDraws(Draws):
    """Philox draws for layer number ``ordinal`` of network number ``stream``."""

    def __init__(self, rng: Tensor, ordinal: int, stream: int) -> None:
        self.rng, self.index, self.stream = rng, torch.tensor([ordinal]), stream
        self.substep = 0

    def _keywords(self) -> dict[str, int]:
        self.substep += 1
        return {"substep": self.substep - 1, "draw": self.stream}

    def normal(self, *shape: int) -> Tensor:
        return ops.normal(self.rng, self.index, shape, ops.Purpose.INITIALIZATION, **self._keywords())[0]

    def uniform(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        values = ops.uniform(self.rng, self.index, ops.Purpose.INITIALIZATION, count, **self._keywords())
        return values.reshape(shape)


class Drawn(nn.Module):
    """A layer with random initial weights or buffers; ``draw`` sets all of them."""

    def draw(self, draws: Draws) -> None:
        raise NotImplementedError


class Linear(nn.Linear, Drawn):
    """A linear layer with initial weights of std gain / sqrt(fan_in) and zero bias."""

    def __init__(self, features_in: int, features_out: int, *, gain: float = 1.0, bias: bool = True) -> None:
        self.gain = gain
        super().__init__(features_in, features_out, bias=bias)

    def reset_parameters(self) -> None:
        """Do nothing: ``initialize`` draws the weights with Philox, not with torch's generator."""

    def draw(self, draws: Draws) -> None:
        std = self.gain / math.sqrt(self.in_features)
        self.weight.copy_(draws.normal(*self.weight.shape).double() * std)
        if self.bias is not None:
            self.bias.zero_()


class Embedding(nn.Embedding, Drawn):
    """A table of class vectors; initial entries are normal with std ``gain``."""

    def __init__(self, count: int, features: int, *, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(count, features)

    def reset_parameters(self) -> None:
        """Do nothing: ``initialize`` draws the weights."""

    def draw(self, draws: Draws) -> None:
        self.weight.copy_(draws.normal(*self.weight.shape).double() * self.gain)


class Weight(Drawn):
    """A weight tensor, such as a stack of matrices; initial entries are normal, std gain / sqrt(fan_in)."""

    def __init__(self, shape: Sequence[int], *, fan_in: int, gain: float = 1.0) -> None:
        super().__init__()
        self.std = gain / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.zeros(*shape))

    def draw(self, draws: Draws) -> None:
        self.weight.copy_(draws.normal(*self.weight.shape).double() * self.std)


@torch.no_grad()
def initialize(network: nn.Module, seed: int, stream: int) -> None:
    """Draw the weights of every ``Drawn`` layer; all other weights are constants.

    The numbers are Philox draws of purpose ``INITIALIZATION``, with the layer's ordinal as the sample index
    and ``stream`` as the draw (one per network of a run). A seed gives the same network on every device and
    torch version.
    """
    rng = ops.make_rng(seed, 0)
    for ordinal, layer in enumerate(module for module in network.modules() if isinstance(module, Drawn)):
        layer.draw(_SeededDraws(rng, ordinal, stream))


class _Stream(NamedTuple):
    rng: Tensor
    samples: Tensor
    substep: int
    layer: int


class Dropout(nn.Module):
    """Zeroes elements of x [N, ...] with ``probability`` in training mode and scales the others up.

    Inside ``dropout_stream`` the masks are Philox draws; outside they come from torch's generator.
    """

    stream: _Stream | None = None

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.probability:
            return x
        return x * (self.kept(x[0].numel(), x).reshape(x.shape).to(x.dtype) / (1 - self.probability))

    def keyed(self) -> dict[str, Any]:
        """Arguments of a fused operation that drops elements; empty where the noise contract drops none."""
        if not self.training or not self.probability or self.stream is None:
            return {}
        rng, index, substep, layer = self.stream
        return {"dropout": self.probability, "rng": rng, "index": index, "substep": substep, "layer": layer}

    def kept(self, count: int, x: Tensor) -> Tensor:
        """Mask bool [N, count] of the elements to keep among ``count`` per sample of x [N, ...]."""
        if self.stream is None:
            return torch.rand(len(x), count, device=x.device) >= self.probability
        rng, index, substep, layer = self.stream
        # 16 bits per element: half the random words, and enough resolution for a dropout probability
        words = ops.random_words(
            rng, index, ops.Purpose.DROPOUT, (count + 1) // 2, substep=substep, draw=layer
        )
        least = round(self.probability * 2**16)
        return torch.cat(((words & 0xFFFF) >= least, (words >> 16) >= least), dim=1)[:, :count]

    def extra_repr(self) -> str:
        return f"{self.probability}"


@contextlib.contextmanager
def dropout_stream(network: nn.Module, rng: Tensor, index: Tensor, *, substep: int = 0) -> Iterator[None]:
    """Make dropout of ``network`` a function of (seed, step, sample index, layer, substep) only.

    ``index`` int64 [N] are the sample indices of the forward passes inside; equal indices share masks.
    """
    layers = [module for module in network.modules() if isinstance(module, Dropout) and module.probability]
    for number, layer in enumerate(layers):
        layer.stream = _Stream(rng, index, substep, number)
    try:
        yield
    finally:
        for layer in layers:
            layer.stream = None


class FourierFeatures(nn.Module):
    """[cos, sin] of log sigma [N] at ``count`` log-spaced frequencies: [N, size] with unit variance.

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
