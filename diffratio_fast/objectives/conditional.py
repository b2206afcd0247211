"""One conditional denoiser D(x, y) = m + (y - 1/2) tau of real (y = 1) and generated (y = 0) images.

At the optimum tau = D_data - D_gen, so the generator descends s_gen - s_data = -tau / sigma^2: the difference
of two denoisers from one network that is trained online, without a teacher. Both images of a pair get the
same noise, as in the ratio step.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.objectives.denoising import error_weight, posterior_mean
from diffratio_fast.objectives.vsd import DenoiserDifference

Conditional = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def conditional_errors(
    network: Conditional,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    purposes: tuple[ops.Purpose, ops.Purpose] = ops.SHARED_NOISE,
    *,
    substep: int = 0,
    stable_targets: bool = False,
) -> Tensor:
    """Weighted denoising errors [B] of pairs of clean images [B, C, H, W] at sigma [B]: means over the pair.

    ``network`` (noised [2B, C, H, W], sigma [2B], labels [2B]) gives (m, tau). Differentiable in its weights.
    """
    fake = fake.detach()
    noised = ops.add_noise((real, fake), sigma, rng, index, purposes, substep=substep)
    image, difference = network(noised, torch.cat((sigma, sigma)), torch.cat((labels, labels)))
    errors = []
    for side, clean, x, m, tau in zip(
        (0.5, -0.5), (real, fake), noised.chunk(2), image.chunk(2), difference.chunk(2), strict=True
    ):
        target = posterior_mean(x, clean, sigma, labels) if stable_targets else clean
        errors.append((m + side * tau - target).square().flatten(1).mean(1))
    return error_weight(sigma) * (errors[0] + errors[1]) / 2


@torch.no_grad()
def score_difference(
    network: Conditional,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    weight: Tensor,
) -> DenoiserDifference:
    """Gradient for the generator: -(1/K) sum_k w(sigma_k) tau / sigma_k^2, per sample.

    As ``vsd.score_difference``: ``fake`` [B, C, H, W]; ``sigma`` and ``weight`` [B, K].
    """
    clean = fake.detach()
    gradient = torch.zeros_like(clean, dtype=torch.promote_types(clean.dtype, torch.float32))
    distances = []
    for k in range(sigma.shape[1]):
        level = sigma[:, k]
        noised = ops.add_noise(clean, level, rng, index, ops.Purpose.NOISE_GENERATOR, draw=k)
        _, tau = network(noised, level, labels)
        factor = weight[:, k] / level**2 / sigma.shape[1]
        gradient -= factor.reshape(-1, *(1,) * (clean.dim() - 1)) * tau
        distances.append(tau.abs().flatten(1).mean(1))
    return DenoiserDifference(gradient, torch.stack(distances, 1))
