"""The denoising objective of EDM and EDM2, by which a network is pre-trained, and a sampler to look at it.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (EDM), and Karras et
al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models" (EDM2).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.data.scaling import SIGMA_DATA

DenoiserCall = Callable[[Tensor, Tensor, Tensor], Tensor]


def denoising_errors(
    denoiser: DenoiserCall,
    x0: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    purpose: ops.Purpose,
    *,
    substep: int = 0,
) -> Tensor:
    """lambda(sigma) |D(x0 + sigma eps; sigma, c) - x0|^2, a mean over pixels, float32 or float64 [B].

    x0 [B, C, H, W], sigma [B], labels int64 [B]. lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2
    makes the error 1 at every noise level for a network that puts out zero (EDM, Table 1).
    """
    noised = ops.add_noise(x0, sigma, rng, index, purpose, substep=substep)
    weight = (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2
    return weight * (denoiser(noised, sigma, labels) - x0).square().flatten(1).mean(1)


def denoising_loss(errors: Tensor, log_variance: Tensor | None) -> Tensor:
    """The mean of errors [B]; with a learned log variance u(sigma) [B] that of errors / e^u + u (EDM2).

    The optimal u is the log of the mean error at its noise level, so that every level weighs the same.
    """
    if log_variance is None:
        return errors.mean()
    return (errors / log_variance.exp() + log_variance).mean()


@torch.no_grad()
def heun(
    denoiser: DenoiserCall,
    noise: Tensor,
    labels: Tensor,
    *,
    steps: int = 18,
    low: float = 0.002,
    high: float = 80.0,
    rho: float = 7.0,
) -> Tensor:
    """Images of a denoiser by the deterministic second-order sampler (EDM, Algorithm 1), from unit noise.

    ``noise`` [N, C, H, W], labels int64 [N]; 2 ``steps`` - 1 network evaluations.
    """
    ramp = torch.linspace(high ** (1 / rho), low ** (1 / rho), steps, dtype=torch.float64) ** rho
    levels = [*ramp.tolist(), 0.0]

    def slope(x: Tensor, sigma: float) -> Tensor:
        return (x - denoiser(x, x.new_full((len(x),), sigma), labels)) / sigma

    x = noise * levels[0]
    for sigma, following in itertools.pairwise(levels):
        first = slope(x, sigma)
        euler = x + (following - sigma) * first
        x = euler if not following else x + (following - sigma) * (first + slope(euler, following)) / 2
    return x
