"""Mixtures of isotropic Gaussians, for which noised densities, scores and distances are known in closed form.

Batched: leading axes S of the parameters are independent mixtures (the independent trainings of a study).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """sum_k w_k N(mean_k, std_k^2 I): weights [*S, K] (of sum 1), means [*S, K, d], stds [*S, K]."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    @property
    def dimensions(self) -> int:
        return self.means.shape[-1]

    def double(self) -> Mixture:
        return Mixture(self.weights.double(), self.means.double(), self.stds.double())

    def expand(self, count: int) -> Mixture:
        """``count`` copies of one mixture, as S = [count]."""
        return Mixture(*(part.expand(count, *part.shape) for part in (self.weights, self.means, self.stds)))

    def noised(self, sigma: Tensor | float) -> Mixture:
        """The law of x + sigma eps: ``sigma`` a number, or [*S, 1]."""
        return Mixture(self.weights, self.means, (self.stds**2 + sigma**2).sqrt())

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw samples [*S, count, d]."""
        x, _, _ = self.sample_parts(count, generator)
        return x

    def sample_parts(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(x [*S, count, d], its components int64 [*S, count], its unit normals): x is differentiable."""
        lead = self.weights.shape[:-1]
        flat = self.weights.detach().reshape(-1, self.weights.shape[-1])
        chosen = torch.multinomial(flat, count, replacement=True, generator=generator).reshape(*lead, count)
        normals = torch.randn(*lead, count, self.dimensions, generator=generator, dtype=self.means.dtype)
        means = self.means.gather(-2, chosen[..., None].expand(*chosen.shape, self.dimensions))
        return means + self.stds.gather(-1, chosen)[..., None] * normals, chosen, normals

    def _components(self, x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
        """(log w_k N_k [*S, N, K], variances that broadcast to it); sigma is a number or [*S, N]."""
        square = torch.as_tensor(sigma, dtype=x.dtype)[..., None] ** 2
        variance = self.stds[..., None, :] ** 2 + square
        distance = (
            x.square().sum(-1, keepdim=True)
            - 2 * x @ self.means.mT
            + self.means.square().sum(-1)[..., None, :]
        )
        log_normal = -distance / (2 * variance) - self.dimensions / 2 * torch.log(2 * math.pi * variance)
        return self.weights.log()[..., None, :] + log_normal, variance

    def log_density(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """log p_sigma(x): [*S, N] for x [*S, N, d] and sigma a number or [*S, N]."""
        return self._components(x, sigma)[0].logsumexp(-1)

    def score(self, x: Tensor, sigma: Tensor | float = 0.0) -> Tensor:
        """grad log p_sigma(x): [*S, N, d]."""
        components, variance = self._components(x, sigma)
        share = components.softmax(-1) / variance
        return share @ self.means - share.sum(-1, keepdim=True) * x

    def denoised(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[x0 | x_sigma = x] = x + sigma^2 score (Tweedie): [*S, N, d] for sigma [*S, N]."""
        return x + sigma[..., None] ** 2 * self.score(x, sigma)


def sliced_wasserstein(a: Mixture, b: Mixture, directions: Tensor, *, points: int = 512) -> Tensor:
    """Mean over unit ``directions`` [P, d] of the one-dimensional Wasserstein-1 distances: [*S].

    The distance of one direction is the integral of |F_a - F_b|, computed by quadrature.
    """
    projected = [(m.means @ directions.mT).mT for m in (a, b)]  # [*S, P, K]
    reach = max(
        float((p.abs() + 8 * m.stds[..., None, :]).max()) for p, m in zip(projected, (a, b), strict=True)
    )
    axis = torch.linspace(-reach, reach, points, dtype=a.means.dtype)
    cumulative = [
        (
            torch.special.ndtr((axis[:, None] - p[..., None, :]) / m.stds[..., None, None, :])
            @ m.weights[..., None, :, None]
        )[..., 0]
        for p, m in zip(projected, (a, b), strict=True)
    ]
    return (cumulative[0] - cumulative[1]).abs().sum(-1).mean(-1) * float(axis[1] - axis[0])


def kullback_leibler_2d(a: Mixture, b: Mixture, *, sigma: float = 0.0, points: int = 161) -> Tensor:
    """KL(a_sigma || b_sigma) on the plane in nats, by quadrature: [*S]."""
    axis = torch.linspace(-2.5, 2.5, points, dtype=a.means.dtype)
    plane = torch.cartesian_prod(axis, axis)
    log_a, log_b = (m.log_density(plane, sigma) for m in (a, b))
    return (log_a.exp() * (log_a - log_b)).sum(-1) * float(axis[1] - axis[0]) ** 2


def unit_directions(count: int, dimensions: int, generator: torch.Generator) -> Tensor:
    """float64 [count, dimensions], uniform on the sphere."""
    directions = torch.randn(count, dimensions, dtype=torch.float64, generator=generator)
    return directions / directions.norm(dim=1, keepdim=True)


def clusters(dimensions: int, count: int, std: float, generator: torch.Generator) -> Mixture:
    """Data with standard deviation 0.5 per coordinate: ``count`` equal clusters.

    The centers are on a circle in two dimensions, and drawn from a normal law in more.
    """
    if dimensions == 2:
        angle = torch.arange(count, dtype=torch.float64) * (2 * math.pi / count)
        means = torch.stack((angle.cos(), angle.sin()), 1)
    else:
        means = torch.randn(count, dimensions, dtype=torch.float64, generator=generator)
        means = means - means.mean(0)
    means = means * math.sqrt((0.25 - std**2) / float(means.square().mean()))
    return Mixture(
        torch.full((count,), 1 / count, dtype=torch.float64), means, torch.full((count,), std).double()
    )


def elongated(data: Mixture, std: float, factor: float) -> Mixture:
    """``data`` with centers whose extent falls by ``factor`` from the first axis to the last.

    The standard deviation per coordinate is 0.5 on average, as before.
    """
    axes = torch.linspace(0, -math.log(factor), data.dimensions, dtype=data.means.dtype).exp()
    means = data.means * axes
    means = means * math.sqrt((0.25 - std**2) / float(means.square().mean()))
    return Mixture(data.weights, means, data.stds)
