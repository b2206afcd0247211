"""The kernel distance: squared maximum mean discrepancy with a cubic kernel (Binkowski et al. 2018)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

BLOCK = 1024
"""Rows and columns of a tile of the kernel matrix; memory is quadratic in it."""


class KernelDistance(NamedTuple):
    """The unbiased estimate from all features (it may be negative) and its standard error, or None.

    The error is that of the mean over disjoint blocks of ``BLOCK`` features; it needs two blocks.
    """

    value: float
    error: float | None


def kernel_distance(x: npt.ArrayLike, y: npt.ArrayLike, device: torch.device | str = "cpu") -> KernelDistance:
    """MMD^2 of features [N, D] and [M, D], N and M at least 2, with k(a, b) = (a.b / D + 1)^3, in float64."""
    a, b = (torch.as_tensor(np.asarray(v), device=device) for v in (x, y))
    if min(len(a), len(b)) < 2:
        raise ValueError("the kernel distance needs at least two images on each side")
    blocks = min(len(a), len(b)) // BLOCK
    error = None
    if blocks >= 2:
        parts = [_mmd(p, q) for p, q in zip(a.split(BLOCK)[:blocks], b.split(BLOCK)[:blocks], strict=True)]
        error = float(np.std(parts, ddof=1) / np.sqrt(blocks))
    return KernelDistance(_mmd(a, b), error)


def _mmd(a: Tensor, b: Tensor) -> float:
    n, m = len(a), len(b)
    own = _sum(a, a, diagonal=False) / (n * (n - 1)) + _sum(b, b, diagonal=False) / (m * (m - 1))
    return own - 2 * _sum(a, b) / (n * m)


def _sum(a: Tensor, b: Tensor, *, diagonal: bool = True) -> float:
    """Sum of the kernel over all pairs; ``diagonal=False`` excludes pairs of a feature with itself."""
    total = 0.0
    for i, rows in enumerate(a.split(BLOCK)):
        for j, columns in enumerate(b.split(BLOCK)):
            kernel = (rows.double() @ columns.double().T / a.shape[1] + 1) ** 3
            if not diagonal and i == j:
                kernel.fill_diagonal_(0)
            total += float(kernel.sum())
    return total
