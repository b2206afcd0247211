"""Argument checks shared by the public functions and the references."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def stream(rng: Tensor, index: Tensor, purposes: Sequence[int], substep: int, draw: int) -> None:
    """Check the arguments that identify random numbers; ``ValueError`` if one is wrong."""
    if rng.dtype != torch.int64 or tuple(rng.shape) != (2,):
        raise ValueError(f"rng must be int64 [2] = (seed, step), got {_describe(rng)}")
    if index.dtype != torch.int64 or index.dim() != 1:
        raise ValueError(f"index must be int64 [N], got {_describe(index)}")
    same_device("index", index, "rng", rng)
    for purpose in purposes:
        if not 0 <= purpose < 256:
            raise ValueError(f"purpose must be 0 to 255, got {purpose}")
    if not 0 <= substep < 256:
        raise ValueError(f"substep must be 0 to 255, got {substep}")
    if not 0 <= draw < 65536:
        raise ValueError(f"draw must be 0 to 65535, got {draw}")


def size(*shape: int) -> None:
    """Check the number of random values per sample: a 32-bit counter, four values per count."""
    if any(n < 0 for n in shape):
        raise ValueError(f"sizes must not be negative, got {tuple(shape)}")
    if math.prod(shape) > 1 << 34:
        raise ValueError(f"at most 2^34 values per sample, got {tuple(shape)}")


class NoiseArguments(NamedTuple):
    inputs: list[Tensor]  # same shape [B, ...] and dtype
    purposes: list[int]
    sigma: Tensor  # [B], dtype ``compute``
    scale: Tensor | None  # [B], dtype ``compute``
    dtype: torch.dtype  # of the result
    compute: torch.dtype


def add_noise(
    x0: Tensor | Sequence[Tensor],
    sigma: Tensor,
    rng: Tensor,
    index: Tensor,
    purpose: int | Sequence[int],
    substep: int,
    draw: int,
    scale: Tensor | None,
    dtype: torch.dtype | None,
) -> NoiseArguments:
    """Check and normalize the arguments of ``add_noise``."""
    inputs = [x0] if isinstance(x0, Tensor) else list(x0)
    purposes = [int(purpose)] if isinstance(purpose, int) else [int(p) for p in purpose]
    if not inputs or len(inputs) != len(purposes):
        raise ValueError(f"one purpose per input: got {len(inputs)} inputs and {len(purposes)} purposes")
    stream(rng, index, purposes, substep, draw)
    first = inputs[0]
    common = first.dtype
    for x in inputs:
        if x.dtype not in FLOATS and x.dtype != torch.float64:
            raise TypeError(f"x0 must be float32, bfloat16, float16 or float64, got {_describe(x)}")
        if x.dim() < 1 or x.shape != first.shape:
            raise ValueError(
                f"inputs must be [B, ...] and alike, got {tuple(first.shape)} and {tuple(x.shape)}"
            )
        same_device("x0", x, "rng", rng)
        common = torch.promote_types(common, x.dtype)
    size(*first.shape[1:])
    if index.shape[0] != first.shape[0]:
        raise ValueError(f"index must have one entry per sample: {index.shape[0]} for {first.shape[0]}")
    result = common if dtype is None else dtype
    compute = torch.float64 if common == torch.float64 else torch.float32
    if result not in ((torch.float64,) if compute == torch.float64 else FLOATS):
        raise TypeError(f"the result of {common} inputs cannot be {result}")
    sigma = _per_sample("sigma", sigma, first, compute)
    if scale is not None:
        scale = _per_sample("scale", scale, first, compute)
    return NoiseArguments([x.to(common) for x in inputs], purposes, sigma, scale, result, compute)


def _per_sample(name: str, value: Tensor, x: Tensor, compute: torch.dtype) -> Tensor:
    if tuple(value.shape) != (x.shape[0],):
        raise ValueError(f"{name} must be [{x.shape[0]}], one value per sample, got {tuple(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    same_device(name, value, "x0", x)
    if value.requires_grad:
        raise ValueError(f"add_noise is not differentiable in {name}: detach it")
    return value.to(compute)


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name} is on {value.device} but {other_name} is on {other.device}")


def _describe(value: Tensor) -> str:
    return f"{value.dtype} {list(value.shape)}".replace("torch.", "")
