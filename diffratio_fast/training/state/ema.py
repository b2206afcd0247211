"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffratio_fast.config.run import RunConfig
from diffratio_fast.training.processes.world import local


def average_decay(config: RunConfig, update: int, step: int) -> float:
    """Decay of the run's average at update ``update``, in training step ``step`` (both from 0)."""
    if config.ema_std is not None:
        return power_decay(update, config.ema_std)
    return ema_decay(step, config.batch_size, config.ema_half_life_images, config.ema_rampup_ratio)


def ema_decay(step: int, batch_size: int, half_life_images: float, rampup_ratio: float | None) -> float:
    """Decay of the average at update number ``step`` (from 0): 2^(-batch / half-life).

    The half-life is at most ``rampup_ratio`` of the number of previous images, so that the initial weights
    lose their influence (the ramp-up of Karras et al. 2022).
    """
    half_life = half_life_images
    if rampup_ratio is not None:
        half_life = min(half_life, step * batch_size * rampup_ratio)
    return 0.5 ** (batch_size / half_life) if half_life > 0 else 0.0


def power_exponent(std: float) -> float:
    """The exponent gamma of the power-function average of relative width ``std``, below 0.29.

    Weights grow as t^gamma up to the current t (Karras et al. 2024, Section 3.1). For a profile gamma + 1
    times t^gamma on [0, 1], variance is (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) = std^2, a cubic in gamma.
    """
    inverse = std**-2
    return float(max(root.real for root in np.roots([1, 7, 16 - inverse, 12 - inverse])))


def power_decay(update: int, std: float) -> float:
    """Decay of the power-function average at update number ``update`` (from 0): (1 - 1/t)^(gamma + 1)."""
    return float((1 - 1 / (update + 1)) ** (power_exponent(std) + 1))


def averaged_copy(network: nn.Module) -> nn.Module:
    """A copy in eval mode without gradients."""
    # clone tensors first: fake tensors of a plan do not support deepcopy
    memo: dict[int, Any] = {id(p): nn.Parameter(p.detach().clone()) for p in network.parameters()}
    memo |= {id(b): b.clone() for b in network.buffers()}
    return copy.deepcopy(network, memo).eval().requires_grad_(False)


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, weight: float | Tensor) -> None:
    """average += weight * (network - average), parameter by parameter; buffers are copied.

    ``weight`` is 1 - decay; a scalar tensor has the parameters' dtype and device.
    """
    averages = [local(parameter) for parameter in average.parameters()]
    parameters = [local(parameter) for parameter in network.parameters()]
    if isinstance(weight, Tensor):
        torch._foreach_lerp_(averages, parameters, [weight] * len(averages))
    else:
        torch._foreach_lerp_(averages, parameters, weight)
    copy_buffers(average, network)


@torch.no_grad()
def copy_buffers(average: nn.Module, network: nn.Module) -> None:
    """Let an average have the network's buffers."""
    for target, source in zip(average.buffers(), network.buffers(), strict=True):
        target.copy_(source)
