"""Reference implementations of the EDM2 operations in plain PyTorch: their definition, on any device.

Arithmetic is float32 (float64 for float64 tensors) with one rounding of each result to the input's type;
equation numbers are those of Karras et al. 2024 (arXiv 2312.02696). Signatures and shapes are those of
``ops.edm2``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffratio_fast.ops import reference_noise
from diffratio_fast.ops.purpose import Purpose

EPS = 1e-4
"""Added to a root mean square before the division."""
SILU_RMS = 0.596
"""The root mean square of SiLU for standard normal input (Eq. 81)."""


def wide(x: Tensor) -> Tensor:
    """Return x as float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()


def mp_silu(x: Tensor) -> Tensor:
    """See :func:`diffratio_fast.ops.edm2.mp_silu`."""
    return (torch.nn.functional.silu(wide(x)) / SILU_RMS).to(x.dtype)


def _normalized(x: Tensor, dim: int) -> Tensor:
    length = math.sqrt(x.shape[dim])
    return x / (EPS + torch.linalg.vector_norm(x, dim=dim, keepdim=True) / length)


def pixel_norm_silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """See :func:`diffratio_fast.ops.edm2.pixel_norm_silu`."""
    y = _normalized(wide(x), 1)
    return y.to(x.dtype), mp_silu(y).to(x.dtype)


def dropout_factors(
    x: Tensor, rng: Tensor, index: Tensor, dropout: float, substep: int, layer: int
) -> Tensor:
    """Factors like x [N, ...]: 1 / (1 - dropout) for kept elements, 0 for dropped ones.

    Each element uses 16 random bits: half a word, precise enough for any dropout rate.
    """
    count = math.prod(x.shape[1:])
    words = reference_noise.random_words(
        rng, index, Purpose.DROPOUT, (count + 1) // 2, substep=substep, draw=layer
    )
    least = round(dropout * 2**16)
    kept = torch.cat(((words & 0xFFFF) >= least, (words >> 16) >= least), dim=1)[:, :count]
    return kept.reshape(x.shape).to(x.dtype) / (1 - dropout)


def scale_silu(
    x: Tensor,
    condition: Tensor,
    *,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    index: Tensor | None = None,
    substep: int = 0,
    layer: int = 0,
) -> Tensor:
    """See :func:`diffratio_fast.ops.edm2.scale_silu`."""
    y = mp_silu(wide(x) * (wide(condition) + 1)[:, :, None, None])
    if dropout:
        assert rng is not None and index is not None
        y = y * dropout_factors(y, rng, index, dropout, substep, layer)
    return y.to(x.dtype)


def sum_clamp(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> Tensor:
    """See :func:`diffratio_fast.ops.edm2.sum_clamp`."""
    size = math.sqrt((1 - t) ** 2 + t**2)
    total = ((1 - t) / size) * wide(a) + (t / size) * wide(b)
    return (total if math.isinf(clip) else total.clamp(-clip, clip)).to(a.dtype)


def sum_clamp_silu(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> tuple[Tensor, Tensor]:
    """See :func:`diffratio_fast.ops.edm2.sum_clamp_silu`."""
    out = sum_clamp(wide(a), wide(b), t, clip)
    return out.to(a.dtype), mp_silu(out).to(a.dtype)


def cat_silu(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """See :func:`diffratio_fast.ops.edm2.cat_silu`."""
    width = math.sqrt((a.shape[1] + b.shape[1]) / ((1 - t) ** 2 + t**2))
    scale_a, scale_b = width * (1 - t) / math.sqrt(a.shape[1]), width * t / math.sqrt(b.shape[1])
    out = torch.cat((scale_a * wide(a), scale_b * wide(b)), dim=1)
    return out.to(a.dtype), mp_silu(out).to(a.dtype)


def ones_channel(x: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """See :func:`diffratio_fast.ops.edm2.ones_channel`."""
    scaled = wide(x) * wide(scale)[:, None, None, None]
    return torch.cat((scaled, torch.ones_like(scaled[:, :1])), dim=1).to(dtype or x.dtype)


def qkv_norm(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """See :func:`diffratio_fast.ops.edm2.qkv_norm`."""
    query, key, value = _normalized(wide(qkv), 4).to(qkv.dtype).permute(2, 0, 3, 1, 4).contiguous().unbind(0)
    return query, key, value
