"""Weights w(sigma) of the generator's gradient over noise levels, as one table.

``sigma2`` makes the gradient the difference of the two denoisers, since D(x) = x + sigma^2 score (Tweedie).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda sigma, sigma_data: torch.ones_like(sigma),
    "sigma": lambda sigma, sigma_data: sigma,
    "sigma2": lambda sigma, sigma_data: sigma**2,
    "bounded": lambda sigma, sigma_data: sigma**2 / (sigma**2 + sigma_data**2),
    "dmd": lambda sigma, sigma_data: sigma * (sigma**2 + sigma_data**2).sqrt() / sigma_data,
}
"""Name to w(sigma, sigma_data): same shape, dtype and device as sigma."""
