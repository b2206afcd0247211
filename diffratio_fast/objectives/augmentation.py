"""Augmentation of the ratio network's input: the same random transform on both halves of a pair.

A density ratio is unchanged by an invertible transform of x, so a transform that real and fake share
does not change the optimum, and it keeps the network from memorizing small data. The transform is applied
before the network, so autograd applies its transpose to the generator's gradient. Evaluation and
verification never use it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio_fast import ops


def roll_shifts(
    rng: Tensor, index: Tensor, probability: float, reach: int, *, substep: int = 0, draw: int = 0
) -> Tensor:
    """Row and column shifts int64 [B, 2], uniform in -reach..reach with ``probability``, else zero."""
    words = ops.uniform(rng, index, ops.Purpose.AUGMENTATION, 3, substep=substep, draw=draw)
    shifts = (words[:, :2] * (2 * reach + 1)).long() - reach
    return torch.where(words[:, 2:] < probability, shifts, torch.zeros_like(shifts))


def roll(x: Tensor, shifts: Tensor) -> Tensor:
    """Cyclic shift of each image of x [B, C, H, W] by its own (rows, columns), int64 [B, 2]."""
    batch, channels, height, width = x.shape
    rows = (torch.arange(height, device=x.device) - shifts[:, :1]) % height
    columns = (torch.arange(width, device=x.device) - shifts[:, 1:]) % width
    places = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, -1)
    return x.flatten(2).gather(2, places.expand(batch, channels, -1)).reshape(x.shape)


def flip(x: Tensor, rng: Tensor, index: Tensor, probability: float, *, substep: int = 0) -> Tensor:
    """Horizontal flip of each image of x [B, C, H, W] with ``probability``: part of p_data, reals only."""
    if probability == 0:
        return x
    chosen = ops.uniform(rng, index, ops.Purpose.FLIP, 1, substep=substep) < probability
    return torch.where(chosen.reshape(-1, 1, 1, 1), x.flip(-1), x)
