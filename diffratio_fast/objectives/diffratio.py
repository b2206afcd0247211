"""DiffRatio's two steps for any ratio network: what the fused operations compute, composed from autograd.

A ratio network is a module ``ratio(noised [N, C, H, W], sigma [N], labels int64 [N]) -> log_ratio [N]``.
Method: arXiv 2502.08005; density-ratio estimation by logistic regression: Sugiyama, Suzuki and Kanamori,
"Density Ratio Estimation in Machine Learning", 2012.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffratio_fast import ops
from diffratio_fast.divergences import Divergence

PENALTY_STEP = 0.1
"""The finite difference of the slope's penalty, in units of sigma."""

RatioNetwork = Callable[[Tensor, Tensor, Tensor], Tensor]


class RatioLoss(NamedTuple):
    """loss: scalar; log ratios: [B] each, detached."""

    loss: Tensor
    log_ratio_real: Tensor
    log_ratio_fake: Tensor


class ScoreDifference(NamedTuple):
    """gradient: float32 like ``fake``, per sample (no 1/B); log_ratio, clamped (bool) and h: [B, K] each."""

    gradient: Tensor
    log_ratio: Tensor
    clamped: Tensor
    h: Tensor


def log_ratio_pair(
    ratio: RatioNetwork,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    purposes: tuple[ops.Purpose, ops.Purpose] = ops.SHARED_NOISE,
    *,
    substep: int = 0,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log ratios ([B], [B]) of noised real and noised fake in one pass; pair i shares sigma_i and label.

    ``purposes`` are the streams of the halves' noise; equal ones give a pair the same noise.
    """
    noised = ops.add_noise((real, fake), sigma, rng, index, purposes, substep=substep, draw=draw)
    log_ratio = ratio(noised, torch.cat((sigma, sigma)), torch.cat((labels, labels)))
    real_half, fake_half = log_ratio.chunk(2)
    return real_half, fake_half


def ratio_loss(
    ratio: RatioNetwork,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    substep: int = 0,
    purposes: tuple[ops.Purpose, ops.Purpose] = ops.SHARED_NOISE,
    weight: Tensor | None = None,
    gradient_penalty: float = 0.0,
) -> RatioLoss:
    """Logistic loss mean softplus(-l_real) + mean softplus(l_fake), differentiable in the network's weights.

    ``real`` and ``fake`` [B, C, H, W] are clean images, ``sigma`` [B]; the optimum is the log ratio of
    p_data,sigma to p_gen,sigma given the label. With ``SHARED_NOISE`` each mean keeps its law, so the
    gradient keeps its expectation, and at large sigma the noise cancels between the halves. ``weight`` [B]
    multiplies each pair's loss; ``gradient_penalty`` is the weight of ``slope_penalty``.
    """
    fake = fake.detach()
    real_half, fake_half = log_ratio_pair(
        ratio, real, fake, sigma, labels, rng, index, purposes, substep=substep
    )
    losses = softplus(-real_half), softplus(fake_half)
    real_loss, fake_loss = (half if weight is None else weight * half for half in losses)
    loss = real_loss.mean() + fake_loss.mean()
    if gradient_penalty:
        halves = (real_half, fake_half)
        penalty = slope_penalty(
            ratio, real, fake, halves, sigma, labels, rng, index, purposes, substep=substep
        )
        loss = loss + gradient_penalty * penalty
    return RatioLoss(loss, real_half.detach(), fake_half.detach())


def slope_penalty(
    ratio: RatioNetwork,
    real: Tensor,
    fake: Tensor,
    log_ratio: tuple[Tensor, Tensor],
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    purposes: tuple[ops.Purpose, ops.Purpose] = ops.SHARED_NOISE,
    *,
    substep: int = 0,
) -> Tensor:
    """Mean of (l(x_sigma) - l(x_sigma + s sigma n))^2 / s^2 over both halves, n unit normal: a scalar.

    For small s = ``PENALTY_STEP`` this is the mean of (sigma |grad l|)^2, without a second derivative in
    the backward pass. ``log_ratio`` are the halves' l of the same noise, from ``log_ratio_pair``.
    """
    noised = ops.add_noise((real, fake), sigma, rng, index, purposes, substep=substep)
    directions = (ops.Purpose.PENALTY_REAL, ops.Purpose.PENALTY_FAKE)
    moved = ops.add_noise(noised.chunk(2), PENALTY_STEP * sigma, rng, index, directions, substep=substep)
    after = ratio(moved, torch.cat((sigma, sigma)), torch.cat((labels, labels)))
    return ((after - torch.cat(log_ratio)) / PENALTY_STEP).square().mean()


def score_difference(
    ratio: RatioNetwork,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    weight: Tensor,
    divergence: Divergence,
    h_mean: Tensor | None = None,
) -> ScoreDifference:
    """Gradient for the generator: -(1/K) sum_k w(sigma_k) h(l_k) grad l(x_sigma_k), per sample.

    ``fake`` [B, C, H, W] is detached here; ``sigma`` and ``weight`` are [B, K], each draw has independent
    noise. ``h_mean`` [B, K] divides h if given. The network's weights get no gradient.
    """
    batch, draws = sigma.shape
    clean = fake.detach()
    noised = torch.cat(
        [
            ops.add_noise(clean, sigma[:, k], rng, index, ops.Purpose.NOISE_GENERATOR, draw=k)
            for k in range(draws)
        ]
    ).requires_grad_()
    with torch.enable_grad():
        log_ratio = ratio(noised, sigma.T.reshape(-1), labels.repeat(draws))
        (slope,) = torch.autograd.grad(log_ratio.sum(), noised)
    log_ratio = log_ratio.detach().reshape(draws, batch).T
    h, clamped = divergence.factor(log_ratio)
    factor = (weight * (h if h_mean is None else h / h_mean) / -draws).T.reshape(
        draws, batch, *(1,) * (fake.dim() - 1)
    )
    gradient = (slope.reshape(draws, *fake.shape) * factor).sum(0)
    return ScoreDifference(gradient.to(torch.promote_types(fake.dtype, torch.float32)), log_ratio, clamped, h)
