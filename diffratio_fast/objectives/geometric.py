"""Geometric augmentation of pre-training, an input of the denoiser (Karras et al. 2022, Appendix F.2).

An image is flipped, scaled, rotated, stretched and shifted at random, and the parameters of the transform are
an input of the network. The number of training images is effectively larger, and without augment labels the
network still models the data: the label of an unchanged image is zero, which is the same as no label.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from diffratio_fast import ops

LABELS = 9
"""Numbers in an augment label: the published networks' ``augment_dim``."""
SCALE = STRETCH = 2**0.2
"""Factor of a scaling or stretching of one standard deviation."""
SHIFT = 1 / 8
"""A translation of one standard deviation, as a part of the image's width."""


class Transform(NamedTuple):
    """Transforms of each of N images, float64 [N] each, in this order; all zero is the identity.

    Angles are in radians. ``stretch`` widens along its angle and narrows perpendicular to it. Shifts are to
    the right and downward.
    """

    mirror: Tensor  # 0 or 1: left for right
    upend: Tensor  # 0 or 1: top for bottom
    scale: Tensor  # the image's content grows by SCALE to this power
    angle: Tensor  # counterclockwise
    stretch: Tensor  # by STRETCH to this power
    stretch_angle: Tensor
    right: Tensor  # in units of SHIFT
    down: Tensor

    def labels(self) -> Tensor:
        """Augment labels of the network, [N, LABELS]."""
        columns = (
            self.mirror, self.upend, self.scale, self.angle.cos() - 1, self.angle.sin(),
            self.stretch * self.stretch_angle.cos(), self.stretch * self.stretch_angle.sin(),
            self.right, self.down,
        )  # fmt: skip
        return torch.stack(columns, dim=1)


def random_transform(rng: Tensor, index: Tensor, probability: float) -> Transform:
    """A transform for each sample index [N]: every other image is mirrored, the rest by ``probability`` each.

    A ``probability`` of zero changes no image.
    """
    if probability == 0:
        return Transform(*torch.zeros(8, len(index), dtype=torch.float64, device=index.device).unbind())
    uniform = ops.uniform(rng, index, ops.Purpose.AUGMENTATION, 9).unbind(1)
    normal = ops.normal(rng, index, (4,), ops.Purpose.AUGMENTATION, draw=1).double().unbind(1)

    def some(value: Tensor, gate: Tensor) -> Tensor:
        return torch.where(gate < probability, value, torch.zeros_like(value))

    half = [(u < 0.5).double() for u in uniform[:2]]
    turns = [(2 * u - 1) * math.pi for u in uniform[2:4]]
    gates = uniform[4:]
    return Transform(
        mirror=half[0],
        upend=some(half[1], gates[0]),
        scale=some(normal[0], gates[1]),
        angle=some(turns[0], gates[2]),
        stretch=some(normal[1], gates[3]),
        stretch_angle=some(turns[1], gates[3]),
        right=some(normal[2], gates[4]),
        down=some(normal[3], gates[4]),
    )


def apply(transform: Transform, x: Tensor) -> Tensor:
    """Images x [N, C, H, W], transformed; beyond the edges the image is mirrored.

    Flips move pixels; for all other transforms new pixels are interpolated (bicubic).
    """
    flips = (_column(transform.mirror, x) > 0, _column(transform.upend, x) > 0)
    x = torch.where(flips[0], x.flip(3), x)
    x = torch.where(flips[1], x.flip(2), x)
    places = _sources(transform, x)
    moved = F.grid_sample(x, places.to(x.dtype), "bicubic", "reflection", align_corners=False)
    others = (transform.scale, transform.angle, transform.stretch, transform.right, transform.down)
    stays = torch.stack([value == 0 for value in others]).all(0)
    return torch.where(stays.reshape(-1, 1, 1, 1), x, moved)


def _column(values: Tensor, x: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (x.ndim - 1))


def _sources(transform: Transform, x: Tensor) -> Tensor:
    """Source position of each pixel of the result: [N, H, W, 2] as (column, row), the image being -1 to 1.

    The maps are inverted, the last one first. Units are pixels, so angles hold if height and width differ.
    Element by element, not by a product of matrices, whose rounding would depend on the batch.
    """
    height, width = x.shape[-2:]
    rows, columns = (
        torch.arange(count, dtype=torch.float64, device=x.device) - (count - 1) / 2
        for count in (height, width)
    )
    u, v = columns.reshape(1, 1, -1), rows.reshape(1, -1, 1)

    def each(values: Tensor) -> Tensor:
        return values.reshape(-1, 1, 1)

    u = u - each(transform.right) * SHIFT * width
    v = v - each(transform.down) * SHIFT * height
    u, v = _turned(u, v, each(-transform.stretch_angle))
    factor = STRETCH ** each(transform.stretch)
    u, v = _turned(u / factor, v * factor, each(transform.stretch_angle))
    u, v = _turned(u, v, each(-transform.angle))
    factor = SCALE ** each(transform.scale)
    u, v = u / factor, v / factor
    return torch.stack(torch.broadcast_tensors(u * (2 / width), v * (2 / height)), dim=3)


def _turned(u: Tensor, v: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """(column, row) rotated counterclockwise, as seen with rows that count downward."""
    cos, sin = angle.cos(), angle.sin()
    return u * cos + v * sin, v * cos - u * sin
