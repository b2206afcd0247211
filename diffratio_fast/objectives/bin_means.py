"""A running mean of the divergence's factor h per noise-level bin.

Dividing h by its mean prevents the noise levels at which a divergence grows fast from dominating every step.
Bins hold equal shares of the generator's noise law. The mean is over earlier steps and part of the
training state, so that a step stays a pure function of (state, step).
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 16
MOMENTUM = 0.01


def initial_means(device: torch.device) -> Tensor:
    """Initial means, 1 for every bin: float32 [BINS]."""
    return torch.ones(BINS, device=device)


def bins(uniforms: Tensor) -> Tensor:
    """The bin of each uniform number behind a noise level: int64, same shape."""
    return (uniforms * BINS).long().clamp(0, BINS - 1)


def bin_sums(bin_of: Tensor, h: Tensor) -> Tensor:
    """Number of values of h in each bin, and their sum: float64 [2, BINS]."""
    hot = torch.nn.functional.one_hot(bin_of.reshape(-1), BINS).double()
    return torch.stack((hot.sum(0), (hot * h.reshape(-1, 1)).sum(0)))


def update_means(means: Tensor, sums: Tensor) -> None:
    """Move each visited bin's mean toward this step's mean of h, in place; ``sums`` are of ``bin_sums``."""
    count, total = sums
    mean = total / count.clamp(min=1)
    means.lerp_(torch.where(count > 0, mean.to(means.dtype), means), MOMENTUM)
