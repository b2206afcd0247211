"""Calibration of a log ratio: three identities of the exact log ratio, reliability and AUC.

For the exact l = log p_data - log p_gen: E_gen[e^l] = 1 and E_data[e^-l] = 1. With equal numbers of reals and
fakes the probability of real is sigmoid(l), so E_data[sigmoid(-l)] = E_gen[sigmoid(l)]. The first two depend
on the tails; the third has a bounded error for any l.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.networks.generate import generate
from diffratio_fast.objectives.diffratio import RatioNetwork
from diffratio_fast.objectives.held_out import log_ratios

Array = npt.NDArray[np.float64]

BINS = 10


class Estimate(NamedTuple):
    """A mean and its standard error, over images."""

    value: float
    error: float


class Bin(NamedTuple):
    """One bin of a reliability diagram: mean predicted probability, observed fraction of reals, images."""

    predicted: float
    observed: float
    images: int


@dataclass(frozen=True)
class Calibration:
    """Calibration at one noise level; ideal: ``generated_mean`` 1, ``data_mean`` 1, ``balance`` 0.

    ``effective_sample_size`` is relative to the number of candidates: (mean w)^2 / mean w^2, where the
    weight w of an image is the mean of e^l over its noise draws.
    """

    sigma: float
    generated_mean: Estimate
    data_mean: Estimate
    balance: Estimate
    auc: float
    effective_sample_size: float
    reliability: tuple[Bin, ...]

    def as_dict(self) -> dict[str, Any]:
        """JSON data; a number that is not finite becomes None."""
        return {name: _plain(value) for name, value in dataclasses.asdict(self).items()}


def calibration(log_ratio_real: Array, log_ratio_fake: Array, sigma: float) -> Calibration:
    """Calibration at ``sigma`` from log ratios [N, K] of reals and [M, K] of fakes, K noise draws an image.

    Reals and fakes must have the same label distribution.
    """
    real, fake = np.asarray(log_ratio_real, np.float64), np.asarray(log_ratio_fake, np.float64)
    if min(len(real), len(fake)) < 2:
        raise ValueError("calibration needs at least two images of each half")
    with np.errstate(
        over="ignore", invalid="ignore"
    ):  # a bad ratio network has infinite means, which are reported
        weights = np.exp(fake).mean(1)
        inverse = np.exp(-real).mean(1)
        generated_mean, data_mean = _estimate(weights), _estimate(inverse)
    missed, taken = _estimate(_sigmoid(-real).mean(1)), _estimate(_sigmoid(fake).mean(1))
    return Calibration(
        float(sigma),
        generated_mean,
        data_mean,
        Estimate(missed.value - taken.value, float(np.hypot(missed.error, taken.error))),
        auc(real, fake),
        effective_sample_size(np.logaddexp.reduce(fake, axis=1)) / len(fake),
        _reliability(real, fake),
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sigmoid(x: Array) -> Array:
    return np.exp(-np.logaddexp(0, -x))


def _estimate(values: Array) -> Estimate:
    return Estimate(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))))


def auc(real: Array, fake: Array) -> float:
    """Probability that a random real has a higher log ratio than a random fake; ties count half."""
    ordered = np.sort(fake, None)
    below = np.searchsorted(ordered, real, "left") + np.searchsorted(ordered, real, "right")
    return float(below.mean() / 2 / fake.size)


def effective_sample_size(log_weights: Array) -> float:
    """(sum w)^2 / sum w^2 of weights given by their logarithms [N] (Kish 1965); from 1 to N."""
    weights = np.exp(log_weights - np.max(log_weights))
    return float(weights.sum() ** 2 / (weights**2).sum())


def _reliability(real: Array, fake: Array) -> tuple[Bin, ...]:
    """Bins of equal width in sigmoid(l); reals and fakes have the same total weight."""
    predicted = np.concatenate((_sigmoid(real).reshape(-1), _sigmoid(fake).reshape(-1)))
    is_real = np.concatenate((np.ones(real.size), np.zeros(fake.size)))
    weight = np.concatenate((np.full(real.size, 1 / real.size), np.full(fake.size, 1 / fake.size)))
    place = np.minimum((predicted * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    mass = np.bincount(place, weight, BINS)
    means = [np.bincount(place, weight * v, BINS) / np.maximum(mass, 1e-300) for v in (predicted, is_real)]
    return tuple(Bin(float(p), float(o), int(n)) for p, o, n in zip(*means, count, strict=True) if n)


@torch.no_grad()
def calibrate(
    ratio: RatioNetwork,
    generator: nn.Module,
    real: Tensor,
    labels: Tensor,
    sigmas: Sequence[float],
    *,
    seed: int,
    fakes: int = 2048,
    draws: int = 4,
) -> list[Calibration]:
    """Calibration of ``ratio`` for ``generator`` at each of ``sigmas``, from reals x0 [B, C, H, W].

    At least ``fakes`` images are generated; the labels of the reals are repeated. The reals should not be
    training data of the network.
    """
    device = real.device
    repeats = max(1, math.ceil(fakes / len(labels)))
    rng = ops.make_rng(seed, 0, device)
    many = labels.repeat(repeats)
    made = generate(generator, many, seed)
    index = torch.arange(len(many), device=device)
    levels = torch.tensor(sigmas, dtype=real.dtype, device=device).repeat_interleave(draws)
    again = real.repeat(repeats, 1, 1, 1)
    # errors of a balance of the halves are those of independent halves: the noise is not shared
    halves = log_ratios(
        ratio, again, made, levels.expand(len(many), -1), many, rng, index, shared_noise=False
    )
    fake_half = halves[1].reshape(len(many), len(sigmas), draws).cpu().numpy()
    # the noise draws of a real are spread over its repeats; together they count as one image
    real_half = halves[0].reshape(repeats, len(labels), len(sigmas), draws).permute(1, 2, 0, 3).flatten(2)
    return [
        calibration(real_half[:, k].cpu().numpy(), fake_half[:, k], sigma) for k, sigma in enumerate(sigmas)
    ]
