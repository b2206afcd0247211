"""Tables of weights over noise levels: w of the generator's gradient, lambda of the ratio network's loss.

``sigma2`` makes the gradient the difference of the two denoisers, since D(x) = x + sigma^2 score (Tweedie).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffratio_fast.config.noise_laws import NoiseLaw

WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda sigma, sigma_data: torch.ones_like(sigma),
    "sigma": lambda sigma, sigma_data: sigma,
    "sigma2": lambda sigma, sigma_data: sigma**2,
    "bounded": lambda sigma, sigma_data: sigma**2 / (sigma**2 + sigma_data**2),
    "dmd": lambda sigma, sigma_data: sigma * (sigma**2 + sigma_data**2).sqrt() / sigma_data,
}
"""Name to w(sigma, sigma_data): same shape, dtype and device as sigma."""

LOSS_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "uniform": lambda sigma, sigma_data: torch.ones_like(sigma),
    "total_std": lambda sigma, sigma_data: (sigma**2 + sigma_data**2).sqrt() / sigma_data,
}
"""Name to lambda(sigma, sigma_data) of the ratio network's loss, up to a factor: like ``WEIGHTS``.

Large noise levels have small log ratios and small gradients; "total_std" increases their weight.
"""
QUANTILES = 10_000


def loss_weight(name: str, law: NoiseLaw, sigma_data: float) -> Callable[[Tensor], Tensor]:
    """A row of ``LOSS_WEIGHTS`` divided by its mean over the law of sigma: a function of sigma."""
    row = LOSS_WEIGHTS[name]
    middles = (torch.arange(QUANTILES, dtype=torch.float64) + 0.5) / QUANTILES
    mean = row(law.quantile(middles), sigma_data).mean()  # a tensor: a plan runs without numbers
    return lambda sigma: row(sigma, sigma_data) / mean
