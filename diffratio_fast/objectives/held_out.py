"""Log ratios of held-out reals and fresh fakes at chosen noise levels: the basis of all measurements."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffratio_fast import ops
from diffratio_fast.config.noise_laws import NoiseLaw
from diffratio_fast.objectives.diffratio import RatioNetwork, log_ratio_pair

LOG_2 = math.log(2.0)

CHUNK = 512
"""Images of each half per forward pass."""


def noise_levels(law: NoiseLaw, count: int) -> Tensor:
    """The middles of ``count`` equal shares of a noise law: float64 [count], ascending."""
    return law.quantile((torch.arange(count, dtype=torch.float64) + 0.5) / count)


def in_chunks(network: Callable[[Tensor, Tensor], Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
    """``network(inputs, labels)`` of any number of samples, ``CHUNK`` at a time."""
    parts = zip(inputs.split(CHUNK), labels.split(CHUNK), strict=True)
    return torch.cat([network(x, c) for x, c in parts])


@torch.no_grad()
def log_ratios(
    ratio: RatioNetwork,
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    shared_noise: bool,
) -> tuple[Tensor, Tensor]:
    """Log ratios float32 ([B, K], [B, K]) of clean reals and fakes [B, C, H, W] at ``sigma`` [B, K].

    Pair i shares label, noise levels and index; every draw has independent noise. With ``shared_noise`` the
    halves of a pair share it: softplus(-l) and softplus(l) then err in opposite directions, and their sum has
    less variance. Without it the halves are independent, which compared estimates require.
    """
    real_noise, fake_noise = ops.Purpose.EVALUATION_REAL, ops.Purpose.EVALUATION_FAKE
    purposes = (real_noise, real_noise if shared_noise else fake_noise)
    rows: list[tuple[Tensor, Tensor]] = []
    for chosen in torch.arange(len(labels), device=labels.device).split(CHUNK):
        columns = [
            log_ratio_pair(
                ratio, real[chosen], fake[chosen], sigma[chosen, k].to(real.dtype), labels[chosen],
                rng, index[chosen], purposes, draw=k,
            )
            for k in range(sigma.shape[1])
        ]  # fmt: skip
        rows.append((torch.stack([c[0] for c in columns], 1), torch.stack([c[1] for c in columns], 1)))
    return torch.cat([row[0] for row in rows]).float(), torch.cat([row[1] for row in rows]).float()


def pair_bounds(log_ratio_real: Tensor, log_ratio_fake: Tensor) -> Tensor:
    """Contribution of each pair to the bound on the Jensen-Shannon divergence, in nats: same shape.

    The mean over pairs is a lower bound, which may be negative and holds for the current ratio network only:
    log 2 - (E_real softplus(-l) + E_fake softplus(l)) / 2 (Nguyen, Wainwright and Jordan 2010;
    Goodfellow et al. 2014).
    """
    return LOG_2 - (softplus(-log_ratio_real) + softplus(log_ratio_fake)) / 2
