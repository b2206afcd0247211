"""DiffRatio's two steps for a RatioMixer, by the fused operations; called like those of ``diffratio``."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.divergences import DIVERGENCES, Divergence
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.objectives.diffratio import RatioLoss, ScoreDifference


def ratio_loss(
    ratio: RatioMixer,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    substep: int = 0,
    purposes: tuple[ops.Purpose, ops.Purpose] = ops.SHARED_NOISE,
    dtype: torch.dtype | None = None,
) -> RatioLoss:
    """See ``diffratio.ratio_loss``; the network's weights are rounded to ``dtype`` if given."""
    conditioning = ratio.conditioning(sigma, labels)
    outcome = ops.ratio_loss(
        ratio.weights(dtype), real, fake, sigma, conditioning, conditioning, rng, index,
        purposes=purposes, substep=substep, sigma_data=ratio.sigma_data,
    )  # fmt: skip
    return RatioLoss(outcome.loss, outcome.log_ratio_real, outcome.log_ratio_fake)


def score_difference(
    ratio: RatioMixer,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    weight: Tensor,
    divergence: Divergence,
    h_mean: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> ScoreDifference:
    """See ``diffratio.score_difference``; the network's weights are rounded to ``dtype`` if given."""
    with torch.no_grad():
        conditioning = ratio.conditioning(sigma, labels)
        outcome = ops.score_difference(
            ratio.weights(dtype), fake, sigma, conditioning, rng, index,
            weight=weight if h_mean is None else weight / h_mean,
            divergence=next(name for name, row in DIVERGENCES.items() if row is divergence),
            sigma_data=ratio.sigma_data,
        )  # fmt: skip
    h, clamped = divergence.factor(outcome.log_ratio)
    return ScoreDifference(outcome.gradient, outcome.log_ratio, clamped, h)
