"""The denoising objective of EDM and EDM2, used for pre-training, and a sampler to inspect the network.

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
    stable_targets: bool = False,
) -> Tensor:
    """lambda(sigma) |D(x0 + sigma eps; sigma, c) - x0|^2, a mean over pixels, float32 or float64 [B].

    x0 [B, C, H, W], sigma [B], labels int64 [B]; lambda is ``error_weight``. ``stable_targets`` replaces x0
    by ``posterior_mean``: less variance, a bias that falls as B grows.
    """
    noised = ops.add_noise(x0, sigma, rng, index, purpose, substep=substep)
    target = posterior_mean(noised, x0, sigma, labels) if stable_targets else x0
    return error_weight(sigma) * (denoiser(noised, sigma, labels) - target).square().flatten(1).mean(1)


def error_weight(sigma: Tensor) -> Tensor:
    """lambda = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, like sigma (EDM, Table 1).

    With it the error of a network whose output is zero is 1 at every noise level.
    """
    return (sigma**2 + SIGMA_DATA**2) / (sigma * SIGMA_DATA) ** 2


@torch.no_grad()
def posterior_mean(noised: Tensor, x0: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    """E[x0 | x_sigma, c] under the uniform law on the batch's images of a label: [B, C, H, W], like x0.

    Xu et al. 2023, "Stable Target Field for Reduced Variance Score Estimation in Diffusion Models".
    """
    x, clean = noised.flatten(1), x0.flatten(1)
    distance = x.square().sum(1, keepdim=True) + clean.square().sum(1) - 2 * x @ clean.T
    logits = -distance / (2 * sigma[:, None] ** 2)
    logits = logits.masked_fill(labels[:, None] != labels, -torch.inf)
    return (logits.softmax(1) @ clean).reshape(x0.shape)


def denoising_loss(errors: Tensor, log_variance: Tensor | None) -> Tensor:
    """The mean of errors [B]; with a learned log variance u(sigma) [B] that of errors / e^u + u (EDM2).

    The optimal u is the log of the mean error at its noise level, so all levels have the same weight.
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
