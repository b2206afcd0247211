"""Magnitude-preserving operations of EDM2 in plain PyTorch, and the choice between them and ``ops.edm2``.

The functions with a counterpart in ``ops.edm2`` have its signature. These here round every step to the
tensors' type and are differentiable any number of times. Equation numbers are those of Karras et al. 2024
(arXiv 2312.02696).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch.nn import functional as F

from diffratio_fast.ops import edm2

EPS = 1e-4


def operations(fused: bool, x: Tensor) -> ModuleType:
    """``ops.edm2`` if ``fused`` and it has compiled code for x, else this module."""
    return edm2 if fused and edm2.compiled_for(x) else sys.modules[__name__]


def normalize(x: Tensor, dim: int | Sequence[int]) -> Tensor:
    """x with vectors along ``dim`` divided by (their root mean square + EPS), computed in float32."""
    dims = [dim] if isinstance(dim, int) else list(dim)
    return (x / (EPS + root_mean_square(x, dims))).to(x.dtype)


def root_mean_square(x: Tensor, dims: list[int]) -> Tensor:
    """Root mean square of vectors along ``dims``: float32, or float64 for float64."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(x, dim=dims, keepdim=True, dtype=dtype)
    length = x.numel() // norm.numel()
    return norm / math.sqrt(length)


def mp_silu(x: Tensor) -> Tensor:
    """SiLU over its root mean square for standard normal input (Eq. 81)."""
    return F.silu(x) / 0.596


def mp_sum(a: Tensor, b: Tensor, t: float) -> Tensor:
    """(1 - t) a + t b, of unit magnitude if a and b are and are uncorrelated (Eq. 88)."""
    return torch.lerp(a, b.to(a.dtype), t) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a: Tensor, b: Tensor, t: float) -> Tensor:
    """Concatenate a and b [N, C, ...], weighted so that b's contribution is t at any width (Eq. 103)."""
    width = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    scale_a, scale_b = width * (1 - t) / math.sqrt(a.shape[1]), width * t / math.sqrt(b.shape[1])
    return torch.cat((scale_a * a, scale_b * b), dim=1)


def pixel_norm_silu(x: Tensor) -> tuple[Tensor, Tensor]:
    y = normalize(x, dim=1)
    return y, mp_silu(y)


def scale_silu(x: Tensor, condition: Tensor) -> Tensor:
    """Without the dropout of ``ops.edm2``: a ``Dropout`` follows."""
    return mp_silu(x * (condition + 1)[:, :, None, None])


def sum_clamp(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> Tensor:
    total = mp_sum(a, b, t)
    return total if math.isinf(clip) else total.clamp(-clip, clip)


def cat_silu(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    y = mp_cat(a, b, t)
    return y, mp_silu(y)


def ones_channel(x: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    scaled = (scale[:, None, None, None] * x).to(dtype or x.dtype)
    return torch.cat((scaled, torch.ones_like(scaled[:, :1])), dim=1)


def qkv_norm(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = normalize(qkv, dim=-1).permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value
