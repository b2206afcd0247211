"""Small pieces that the networks share."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from diffratio_fast import ops


class Draws:
    """Random numbers for one layer's weights: from torch's generator here, from a seed in ``initialise``."""

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape)

    def uniform(self, *shape: int) -> Tensor:
        """Between 0 and 1."""
        return torch.rand(shape)


class _SeededDraws(Draws):
    """Draws of the noise contract for layer number ``ordinal`` of network number ``stream``."""

    def __init__(self, rng: Tensor, ordinal: int, stream: int) -> None:
        self.rng, self.index, self.stream = rng, torch.tensor([ordinal]), stream
        self.substep = 0

    def _keywords(self) -> dict[str, int]:
        self.substep += 1
        return {"substep": self.substep - 1, "draw": self.stream}

    def normal(self, *shape: int) -> Tensor:
        return ops.normal(self.rng, self.index, shape, ops.Purpose.INITIALISATION, **self._keywords())[0]

    def uniform(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        values = ops.uniform(self.rng, self.index, ops.Purpose.INITIALISATION, count, **self._keywords())
        return values.reshape(shape)


class Drawn(nn.Module):
    """A layer whose weights (or buffers) start at random: ``draw`` sets all of them."""

    def draw(self, draws: Draws) -> None:
        raise NotImplementedError


class Linear(nn.Linear, Drawn):
    """A linear layer that states its initial scale: weights of std gain / sqrt(fan_in), bias zero."""

    def __init__(self, features_in: int, features_out: int, *, gain: float = 1.0, bias: bool = True) -> None:
        self.gain = gain
        super().__init__(features_in, features_out, bias=bias)

    def reset_parameters(self) -> None:
        """Left to ``initialise``: the draws come from the noise contract, not from torch's generator."""

    def draw(self, draws: Draws) -> None:
        std = self.gain / math.sqrt(self.in_features)
        self.weight.copy_(draws.normal(*self.weight.shape).double() * std)
        if self.bias is not None:
            self.bias.zero_()


class Embedding(nn.Embedding, Drawn):
    """A table of class vectors whose entries start normal with std ``gain``."""

    def __init__(self, count: int, features: int, *, gain: float = 1.0) -> None:
        self.gain = gain
        super().__init__(count, features)

    def reset_parameters(self) -> None:
        """Left to ``initialise``."""

    def draw(self, draws: Draws) -> None:
        self.weight.copy_(draws.normal(*self.weight.shape).double() * self.gain)


class Weight(Drawn):
    """A bare tensor (a stack of matrices, say) whose entries start normal with std gain / sqrt(fan_in)."""

    def __init__(self, shape: Sequence[int], *, fan_in: int, gain: float = 1.0) -> None:
        super().__init__()
        self.std = gain / math.sqrt(fan_in)
        self.weight = nn.Parameter(torch.zeros(*shape))

    def draw(self, draws: Draws) -> None:
        self.weight.copy_(draws.normal(*self.weight.shape).double() * self.std)


@torch.no_grad()
def initialise(network: nn.Module, seed: int, stream: int) -> None:
    """Draw the weights of every ``Drawn`` layer; all else starts as a constant.

    The numbers are those of the noise contract (purpose ``INITIALISATION``; the layer's ordinal in the place
    of the sample index, ``stream`` in that of the draw: one for each network of a run), so that a seed gives
    the same network on every device and torch version.
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
    """Zeroes elements of x [N, ...] with ``probability`` in training mode, and scales up the others.

    Inside ``dropout_stream`` the masks are those of the noise contract; outside they are torch's.
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
        """bool [N, count]: what stays of ``count`` elements of each sample of x [N, ...]."""
        if self.stream is None:
            return torch.rand(len(x), count, device=x.device) >= self.probability
        rng, index, substep, layer = self.stream
        # sixteen bits decide an element: half the words, and enough for any rate of dropout
        words = ops.random_words(
            rng, index, ops.Purpose.DROPOUT, (count + 1) // 2, substep=substep, draw=layer
        )
        least = round(self.probability * 2**16)
        return torch.cat(((words & 0xFFFF) >= least, (words >> 16) >= least), dim=1)[:, :count]

    def extra_repr(self) -> str:
        return f"{self.probability}"


@contextlib.contextmanager
def dropout_stream(network: nn.Module, rng: Tensor, index: Tensor, *, substep: int = 0) -> Iterator[None]:
    """Let dropout of ``network`` be a function of (seed, step, sample index, layer, substep) alone.

    ``index`` int64 [N] are the indices of the samples in the passes made inside; equal ones share masks.
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
