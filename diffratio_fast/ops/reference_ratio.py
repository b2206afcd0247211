"""The ratio operations in plain PyTorch: the definition of the RatioMixer, on any device.

With x [channels, H, W] one noised image at noise level sigma and e = ``conditioning`` its vector of
D = C + L H numbers (C channels, L layers, H hidden units; docs/ratio_mixer.md explains the design):

    z = c_in patches(x)                     [T, P]   c_in = 1 / sqrt(sigma^2 + sigma_data^2)
    h = z patch^T + position + e[:C]        [T, C]
    for every layer l:
        m = h + mix_l h + mix_bias_l        [T, C]   over tokens; mix_bias_l: one number per token
        u = m up_l^T + e_l                  [T, H]   over channels; e_l = e[C + l H : C + (l + 1) H]
        h = 0.7 (m + silu(u) down_l^T)      [T, C]
    log ratio = sum over t, c of head * h, and with an energy head + sum over t, p of z * (h energy) / sqrt(T
    P)

Token t is row * W / p + column of its patch; its vector is ordered (channel, row, column). There are no norms
and no other biases. Arithmetic is float32 for all dtypes, or float64 for float64 images.
Signatures, shapes and errors are those of the public functions in ``ops.ratio``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.ops import ratio_checks as checks
from diffratio_fast.ops import reference_noise
from diffratio_fast.ops.purpose import Purpose

RESIDUAL = 0.7
"""Factor on the output of a layer: keeps the magnitude of the sum of two branches without a norm."""


class ScoreDifference(NamedTuple):
    """gradient: float32 (float64) with the shape of ``fake``; log_ratio [B, K]."""

    gradient: Tensor
    log_ratio: Tensor


class RatioLoss(NamedTuple):
    """The loss (a differentiable scalar), log ratios [B] of both halves, and the gradients of the loss.

    The gradients are with respect to each weight and to (conditioning_real, conditioning_fake). Only the loss
    is differentiable."""

    loss: Tensor
    log_ratio_real: Tensor
    log_ratio_fake: Tensor
    weight_gradients: list[Tensor]
    conditioning_gradients: tuple[Tensor, Tensor]


def patches(x: Tensor, size: int) -> Tensor:
    """Patch vectors [B, T, channels * size^2] of images [B, channels, H, W]."""
    batch, channels, height, width = x.shape
    parts = x.reshape(batch, channels, height // size, size, width // size, size)
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def log_ratio(
    weights: Sequence[Tensor], noised: Tensor, sigma: Tensor, conditioning: Tensor, *, sigma_data: float = 0.5
) -> Tensor:
    """See :func:`diffratio_fast.ops.log_ratio`."""
    sizes = checks.layout(weights, noised)
    sigma = checks.level("sigma", sigma, (noised.shape[0],), noised)
    e = checks.column("conditioning", conditioning, (noised.shape[0], sizes.conditioning), noised)
    patch, position, mix, mix_bias, up, down, head, *energy = (weight.to(sigma.dtype) for weight in weights)
    c_in = (sigma**2 + sigma_data**2).rsqrt()
    token, *biases = e[:, None].split([sizes.width, *[sizes.hidden] * sizes.depth], dim=2)
    z = patches(noised.to(sigma.dtype), sizes.size) * c_in[:, None, None]
    h = z @ patch.T + position + token
    for mix_l, b_l, up_l, down_l, e_l in zip(mix, mix_bias, up, down, biases, strict=True):
        m = h + mix_l @ h + b_l[:, None]
        h = RESIDUAL * (m + silu(m @ up_l.T + e_l) @ down_l.T)
    value = (head * h).sum((1, 2))
    if sizes.energy:
        value = value + (z * (h @ energy[0])).sum((1, 2)) / math.sqrt(z[0].numel())
    return value


def score_difference(
    weights: Sequence[Tensor],
    fake: Tensor,
    sigma: Tensor,
    conditioning: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    weight: Tensor,
    divergence: str = "reverse_kl",
    purpose: int = Purpose.NOISE_GENERATOR,
    substep: int = 0,
    sigma_data: float = 0.5,
) -> ScoreDifference:
    """See :func:`diffratio_fast.ops.score_difference`."""
    checks.stream(fake, rng, index, [purpose], substep)
    sizes = checks.layout(weights, fake)
    if sigma.dim() != 2 or sigma.shape[1] == 0:
        raise ValueError(f"sigma must be [B, K] with K >= 1, got {list(sigma.shape)}")
    batch, draws = fake.shape[0], sigma.shape[1]
    sigma = checks.level("sigma", sigma, (batch, draws), fake)
    weight = checks.level("weight", weight, (batch, draws), fake)
    e = checks.column("conditioning", conditioning, (batch, draws, sizes.conditioning), fake)
    checks.divergence_code(divergence)
    constants = [w.detach() for w in weights]
    gradient = torch.zeros_like(fake, dtype=sigma.dtype)
    log_ratios = []
    for k in range(draws):
        noised = reference_noise.add_noise(
            fake.detach().to(sigma.dtype), sigma[:, k], rng, index, purpose, substep=substep, draw=k
        ).requires_grad_()
        with torch.enable_grad():
            value = log_ratio(constants, noised, sigma[:, k], e[:, k].detach(), sigma_data=sigma_data)
            (slope,) = torch.autograd.grad(value.sum(), noised)
        factor = weight[:, k] * DIVERGENCES[divergence].factor(value)[0] / -draws
        gradient += factor[:, None, None, None] * slope
        log_ratios.append(value.detach())
    return ScoreDifference(gradient, torch.stack(log_ratios, dim=1))


class WithGradients(torch.autograd.Function):
    """A value with precomputed gradients: backward multiplies them by upstream."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[:count])
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [upstream[0].to(g.dtype) * g for g in ctx.saved_tensors]
        return (None, None, *[None] * len(gradients), *gradients)


def ratio_loss(
    weights: Sequence[Tensor],
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    conditioning_real: Tensor,
    conditioning_fake: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    purposes: tuple[int, int] = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE),
    substep: int = 0,
    sigma_data: float = 0.5,
) -> RatioLoss:
    """See :func:`diffratio_fast.ops.ratio_loss`."""
    checks.stream(real, rng, index, purposes, substep)
    sizes = checks.layout(weights, real)
    if fake.shape != real.shape or fake.dtype != real.dtype or fake.device != real.device:
        raise ValueError("real and fake must have one shape, dtype and device")
    batch = real.shape[0]
    if batch == 0:
        raise ValueError("the loss of no samples is not defined")
    sigma = checks.level("sigma", sigma, (batch,), real)
    halves = [
        checks.column(f"conditioning_{name}", e, (batch, sizes.conditioning), real)
        for name, e in (("real", conditioning_real), ("fake", conditioning_fake))
    ]
    inputs = [*weights, *halves]
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    with torch.enable_grad():
        values = []
        for x0, e, purpose in zip((real, fake), leaves[-2:], purposes, strict=True):
            clean = x0.detach().to(sigma.dtype)
            noised = reference_noise.add_noise(clean, sigma, rng, index, purpose, substep=substep)
            values.append(log_ratio(leaves[:-2], noised, sigma, e, sigma_data=sigma_data))
        loss = softplus(-values[0]).mean() + softplus(values[1]).mean()
        gradients = torch.autograd.grad(loss, leaves)
    result: Tensor = WithGradients.apply(loss.detach(), len(inputs), *gradients, *inputs)
    return RatioLoss(
        result, values[0].detach(), values[1].detach(), list(gradients[:-2]), (gradients[-2], gradients[-1])
    )
