"""Two estimators of a score difference, for many independent trainings: a ratio, or two denoisers.

The losses are those of ``objectives.diffratio`` and ``objectives.denoising``, summed over trainings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
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


def draw_sigma(law: str, count: int, batch: int, generator: torch.Generator) -> Tensor:
    """Draw noise levels float32 [count, batch]."""
    uniforms = torch.rand(count, batch, generator=generator, dtype=torch.float64)
    return parse_noise_law(law).quantile(uniforms).float()


def ratio_loss(
    ratio: Ratios, real: Tensor, fake: Tensor, sigma: Tensor, penalty: float, generator: torch.Generator
) -> Tensor:
    """Logistic loss of each training [S], plus ``penalty`` times the slope penalty by a finite difference."""
    both = torch.cat((sigma, sigma), 1)
    noised = torch.cat((real, fake), 1)
    noised = noised + both[..., None] * torch.randn(noised.shape, generator=generator)
    log_ratio = ratio(noised, both)
    real_half, fake_half = log_ratio.chunk(2, 1)
    loss = softplus(-real_half).mean(1) + softplus(fake_half).mean(1)
    if penalty:
        moved = noised + PENALTY_STEP * both[..., None] * torch.randn(noised.shape, generator=generator)
        loss = loss + penalty * ((log_ratio - ratio(moved, both)) / PENALTY_STEP).square().mean(1)
    return loss


def denoising_loss(denoiser: Denoisers, x0: Tensor, sigma: Tensor, generator: torch.Generator) -> Tensor:
    """Weighted denoising error of each training [S] (Karras et al. 2022)."""
    noised = x0 + sigma[..., None] * torch.randn(x0.shape, generator=generator)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return (weight * (denoiser(noised, sigma) - x0).square().mean(-1)).mean(1)


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
        loss = ratio_loss(ratio, x, y, sigma, settings.penalty, generator)
        descend(optimizer, loss, _rate(settings, step))


def train_denoiser(
    denoiser: Denoisers, clean: Sampler, settings: Settings, generator: torch.Generator
) -> None:
    """Like ``train_ratio``, for denoisers."""
    optimizer = adam(denoiser, settings.rate, settings.beta1, settings.decay)
    for step in range(settings.steps):
        x = clean(settings.batch)
        sigma = draw_sigma(settings.law, len(x), settings.batch, generator)
        descend(optimizer, denoising_loss(denoiser, x, sigma, generator), _rate(settings, step))
