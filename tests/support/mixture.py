"""Two mixtures of Gaussians in the plane: samples and exact noised log densities."""

from __future__ import annotations

import math

import torch
from torch import Tensor

DATA = (torch.tensor([[0.6, 0.0], [-0.3, 0.5], [-0.3, -0.5]]), 0.15)
MODEL = (torch.tensor([[0.4, 0.1], [-0.2, 0.3], [-0.2, -0.6]]), 0.25)
SHAPE = (1, 1, 2)


def draw(mixture: tuple[Tensor, float], count: int, generator: torch.Generator) -> Tensor:
    means, std = mixture
    chosen = torch.randint(len(means), (count,), generator=generator)
    return (means[chosen] + std * torch.randn(count, 2, generator=generator)).reshape(-1, *SHAPE)


def log_density(mixture: tuple[Tensor, float], x: Tensor, sigma: Tensor) -> Tensor:
    means, std = mixture
    variance = std**2 + sigma.double() ** 2
    squares = ((x.flatten(1)[:, None] - means.double()) ** 2).sum(-1)
    components = -squares / (2 * variance[:, None]) - torch.log(2 * math.pi * variance)[:, None]
    return torch.logsumexp(components, 1) - math.log(len(means))
