"""Two estimators of a score difference, for many independent trainings: a ratio, or two denoisers.

The losses are those of ``objectives.diffratio`` and ``objectives.denoising``, summed over trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.studies.batched_networks import BatchedNetworks, Denoisers, Ratios
from diffratio_fast.config.noise_laws import parse_noise_law
from diffratio_fast.data.scaling import SIGMA_DATA

Sampler = Callable[[int], Tensor]
"""Clean points [S, N, d]."""

PENALTY_STEP = 0.1
"""The finite difference of the gradient penalty, in units of sigma."""


@dataclass(frozen=True)
class Settings:
    """Training options of one network; networks of a comparison differ in the rate only."""

    steps: int
    batch: int = 128
    law: str = "loguniform(0.05, 5)"
    rate: float = 5e-3
    beta1: float = 0.9
    penalty: float = 0.0
    decay: float = 0.0
    shared: bool = False  # the real and the generated point of a pair get the same noise
    matched: bool = False  # optimal assignment of the generated points of a batch to the real ones
    stable: bool = False  # denoisers: the target is the posterior mean over the batch


def draw_sigma(law: str, count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels float32 [count, batch]."""
    uniforms = torch.rand(count, batch, generator=generator, dtype=torch.float64)
    return parse_noise_law(law).quantile(uniforms).float()


def ratio_loss(
    ratio: Ratios,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> Tensor:
    """Logistic loss of each training [S], plus the weighted slope penalty by a finite difference."""
    penalty = settings.penalty
    both = torch.cat((sigma, sigma), 1)
    if settings.matched:
        fake = fake.gather(1, assignment(real, fake)[..., None].expand_as(fake))
    noise = torch.randn(real.shape if settings.shared else (len(real), 2 * real.shape[1], real.shape[2]),
                        generator=generator)  # fmt: skip
    noise = torch.cat((noise, noise), 1) if settings.shared else noise
    noised = torch.cat((real, fake), 1) + both[..., None] * noise
    log_ratio = ratio(noised, both)
    real_half, fake_half = log_ratio.chunk(2, 1)
    loss = softplus(-real_half).mean(1) + softplus(fake_half).mean(1)
    if penalty:
        moved = noised + PENALTY_STEP * both[..., None] * torch.randn(noised.shape, generator=generator)
        loss = loss + penalty * ((log_ratio - ratio(moved, both)) / PENALTY_STEP).square().mean(1)
    return loss


def assignment(real: Tensor, fake: Tensor) -> Tensor:
    """For each training the permutation int64 [S, N] of ``fake`` that is nearest to ``real`` [S, N, d]."""
    squares = torch.cdist(real, fake).square()
    return torch.stack([torch.as_tensor(linear_sum_assignment(cost.numpy())[1]) for cost in squares])


def denoising_loss(
    denoiser: Denoisers, x0: Tensor, sigma: Tensor, generator: torch.Generator, *, stable: bool = False
) -> Tensor:
    """Weighted denoising error of each training [S] (Karras et al. 2022); see ``Settings.stable``."""
    noised = x0 + sigma[..., None] * torch.randn(x0.shape, generator=generator)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    target = x0
    if stable:
        logits = -torch.cdist(noised, x0).square() / (2 * sigma[..., None] ** 2)
        target = logits.softmax(-1) @ x0
    return (weight * (denoiser(noised, sigma) - target).square().mean(-1)).mean(1)


def adam(networks: BatchedNetworks, rate: float, beta1: float, decay: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.AdamW(networks.parameters(), rate, betas=(beta1, 0.99), weight_decay=decay, fused=True)


def descend(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    """Run one update of all trainings."""
    optimizer.param_groups[0]["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.sum().backward()
    optimizer.step()


def _rate(settings: Settings, step: int) -> float:
    return settings.rate * (0.5 + 0.5 * math.cos(math.pi * step / settings.steps))


def train_ratio(
    ratio: Ratios, real: Sampler, fake: Sampler, settings: Settings, generator: torch.Generator
) -> None:
    """Train in place against fixed laws; the rate decays to zero."""
    optimizer = adam(ratio, settings.rate, settings.beta1, settings.decay)
    for step in range(settings.steps):
        x, y = real(settings.batch), fake(settings.batch)
        sigma = draw_sigma(settings.law, len(x), settings.batch, generator)
        loss = ratio_loss(ratio, x, y, sigma, settings, generator)
        descend(optimizer, loss, _rate(settings, step))


def train_denoiser(
    denoiser: Denoisers, clean: Sampler, settings: Settings, generator: torch.Generator
) -> None:
    """Like ``train_ratio``, for denoisers."""
    optimizer = adam(denoiser, settings.rate, settings.beta1, settings.decay)
    for step in range(settings.steps):
        x = clean(settings.batch)
        sigma = draw_sigma(settings.law, len(x), settings.batch, generator)
        loss = denoising_loss(denoiser, x, sigma, generator, stable=settings.stable)
        descend(optimizer, loss, _rate(settings, step))
