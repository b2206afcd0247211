"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


def ema_decay(step: int, batch_size: int, half_life_images: float, rampup_ratio: float | None) -> float:
    """Decay of the average at update number ``step`` (from 0): 2^(-batch / half-life).

    The half-life is at most ``rampup_ratio`` of the images seen before, so that the average forgets the
    random start (the ramp-up of Karras et al. 2022).
    """
    half_life = half_life_images
    if rampup_ratio is not None:
        half_life = min(half_life, step * batch_size * rampup_ratio)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


def averaged_copy(network: nn.Module) -> nn.Module:
    """A copy in eval mode that takes no gradient."""
    return copy.deepcopy(network).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, decay: float) -> None:
    """average = decay * average + (1 - decay) * network, parameter by parameter; buffers are copied."""
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1.0 - decay)
    for target, source in zip(average.buffers(), network.buffers(), strict=True):
        target.copy_(source)
