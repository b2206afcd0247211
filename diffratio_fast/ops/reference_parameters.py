"""Reference implementations of the parameter operations in plain PyTorch: their definition, on any device.

Signatures and shapes are those of ``ops.parameters``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1e-4
"""Added to a row's root mean square before the division."""


def rows_rms(weight: Tensor) -> Tensor:
    """The root mean square of each row weight[i], in a shape that broadcasts."""
    dims = list(range(1, weight.ndim))
    length = math.sqrt(max(weight[0].numel(), 1)) if len(weight) else 1.0
    return torch.linalg.vector_norm(weight, dim=dims, keepdim=True) / length


def normalize_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`diffratio_fast.ops.parameters.normalize_weight`."""
    if not weight.numel():
        return weight.to(dtype or weight.dtype)
    scale = 1 / ((EPS + rows_rms(weight)) * math.sqrt(weight[0].numel()))
    return (weight * scale).to(dtype or weight.dtype)


@torch.no_grad()
def adam_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
    decay: float = 0.0,
    decoupled: bool = True,
    averages: Sequence[tuple[Sequence[Tensor], float | Tensor]] = (),
    normalize: Sequence[bool] | None = None,
    normalized: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """See :func:`diffratio_fast.ops.parameters.adam_step`."""
    squares = []
    for i, (weight, gradient) in enumerate(zip(weights, gradients, strict=True)):
        squares.append(gradient.square().sum())
        if decoupled:
            g = gradient
            weight.mul_(1 - rate * decay)
        else:
            g = gradient + decay * weight
        first[i].mul_(beta1).add_((1 - beta1) * g)
        second[i].mul_(beta2).add_((1 - beta2) * g * g)
        root = second[i].sqrt() / (1 - beta2 ** steps[i]).sqrt() + eps
        weight.sub_(rate / (1 - beta1 ** steps[i]) * (first[i] / root))
        for tensors, share in averages:
            tensors[i].lerp_(weight, share)
        if normalize is not None and normalize[i] and weight.numel():
            weight.mul_((1 - EPS) / rows_rms(weight).clamp(min=EPS))
            target = normalized[i] if normalized is not None else None
            if target is not None:
                target.copy_(normalize_weight(weight))
    return torch.stack(squares)
