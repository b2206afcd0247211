"""Fidelity and diversity by nearest neighbors: precision and recall (Kynkaanniemi et al. 2019), density and
coverage (Naeem et al. 2020). The ball of a point extends to its k-th nearest neighbor in its own set."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

PRECISION_K = 3
DENSITY_K = 5
"""Published numbers of neighbors for each pair of metrics."""
BLOCK = 1024
"""Rows and columns of a tile of the distance matrix; memory is quadratic in it."""


class NeighborMetrics(NamedTuple):
    """Fractions in [0, 1], except density, which has expectation 1 for equal distributions.

    Precision: generated images inside the ball of a real image. Recall: real images inside the ball of a
    generated image. Density: number of real balls that contain a generated image, over k. Coverage: real
    balls that contain a generated image.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def neighbor_metrics(
    generated: npt.ArrayLike, real: npt.ArrayLike, device: torch.device | str = "cpu"
) -> NeighborMetrics:
    """Compute the metrics of features [N, D] and [M, D], N and M above ``DENSITY_K``, in float64."""
    fake, true = (torch.as_tensor(np.asarray(v), device=device) for v in (generated, real))
    if min(len(fake), len(true)) <= DENSITY_K:
        raise ValueError(f"nearest neighbors need more than {DENSITY_K} images on each side")
    fake_radius = _radii(fake)[:, PRECISION_K - 1]
    true_radii = _radii(true)
    narrow, wide = true_radii[:, PRECISION_K - 1], true_radii[:, DENSITY_K - 1]
    recalled = torch.zeros(len(true), dtype=torch.bool, device=true.device)
    nearest = torch.full((len(true),), torch.inf, dtype=torch.float64, device=true.device)
    precise = inside = 0
    for i, rows in enumerate(fake.split(BLOCK)):
        found = torch.zeros(len(rows), dtype=torch.bool, device=true.device)
        own = fake_radius[i * BLOCK : i * BLOCK + len(rows), None]
        for j, columns in enumerate(true.split(BLOCK)):
            part = slice(j * BLOCK, j * BLOCK + len(columns))
            distance = _distances(rows, columns)
            found |= (distance <= narrow[part]).any(1)
            inside += int((distance <= wide[part]).sum())
            recalled[part] |= (distance <= own).any(0)
            nearest[part] = torch.minimum(nearest[part], distance.amin(0))
        precise += int(found.sum())
    return NeighborMetrics(
        precision=precise / len(fake),
        recall=float(recalled.double().mean()),
        density=inside / (DENSITY_K * len(fake)),
        coverage=float((nearest <= wide).double().mean()),
    )


def _radii(x: Tensor) -> Tensor:
    """Distances float64 [N, DENSITY_K] of each point to its nearest neighbors."""
    result = []
    for i, rows in enumerate(x.split(BLOCK)):
        best = torch.full((len(rows), DENSITY_K), torch.inf, dtype=torch.float64, device=x.device)
        for j, columns in enumerate(x.split(BLOCK)):
            distance = _distances(rows, columns)
            if i == j:
                distance.fill_diagonal_(torch.inf)
            both = torch.cat([best, distance], 1)
            best = both.topk(DENSITY_K, dim=1, largest=False).values
        result.append(best)
    return torch.cat(result)


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances float64 [n, m]; exactly 0 for equal points, unlike a matrix product alone."""
    return torch.cdist(a.double(), b.double(), compute_mode="use_mm_for_euclid_dist_if_necessary")
