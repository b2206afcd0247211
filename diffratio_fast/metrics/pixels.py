"""Small images as vectors of their own pixels, and what all measurements of a run share.

Pixels are in [-1, 1] over the range of the records (``to_pixels``), independent of the scaling of the
networks, so that metrics of different runs are comparable.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast.data.dataset import DataSet

MAX_DIMENSION = 1024
"""Maximum numbers per image; the pixel covariance of larger images is expensive and not meaningful."""
MAX_RECORDS = 10_000
"""Records of a split that references are computed from, at most."""


def to_pixels(dataset: DataSet, x0: Tensor) -> npt.NDArray[np.float64]:
    """Convert x0 [N, C, H, W] to float64 [N, C*H*W] in [-1, 1], clipped to the record range, not rounded."""
    low, high = dataset.scaling.low, dataset.scaling.high
    if low is None or high is None:
        raise ValueError(f"{dataset.name} has no pixel range")
    records = dataset.scaling.to_records(x0.double().cpu()).clamp(low, high)
    return (2 * (records - low) / (high - low) - 1).flatten(1).numpy()


def proportional_labels(labels: Tensor, count: int, classes: int) -> Tensor:
    """Labels int64 [count], sorted, with the class frequencies of ``labels`` (largest remainders)."""
    frequency = torch.bincount(labels, minlength=classes).double() / len(labels) * count
    numbers = frequency.floor().long()
    remainder = frequency - numbers
    for label in remainder.argsort(descending=True, stable=True)[: count - int(numbers.sum())]:
        numbers[label] += 1
    place = torch.cat([(torch.arange(int(n)) + 0.5) / max(int(n), 1) for n in numbers])
    return torch.repeat_interleave(torch.arange(classes), numbers)[place.argsort(stable=True)]


def nearest_distance(
    samples: npt.NDArray[np.float64], references: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Euclidean distance of each sample [N, D] to its nearest reference [M, D]: float64 [N]."""
    references_t = torch.from_numpy(references).double()
    blocks = torch.from_numpy(samples).double().split(1024)
    return torch.cat([torch.cdist(block, references_t).amin(1) for block in blocks]).numpy()
