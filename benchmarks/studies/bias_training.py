"""Generators trained by DiffRatio, by score distillation and by the exact score difference.

The generator is a mixture of Gaussians with equal weights: x = mean_k + std_k eps with a random component k.
Its noised density is known at every step, and so are the exact gradient, the error of the estimated gradient
and the distance to the data.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from benchmarks.studies.batched_networks import Denoisers, Ratios
from benchmarks.studies.mixtures import Mixture, kullback_leibler_2d, sliced_wasserstein, unit_directions
from benchmarks.studies.score_estimators import (
    Settings,
    adam,
    denoising_loss,
    descend,
    draw_sigma,
    ratio_loss,
)
from diffratio_fast.data.scaling import SIGMA_DATA
from diffratio_fast.divergences import DIVERGENCES, Divergence
from diffratio_fast.objectives.weights import WEIGHTS

DIRECTIONS = 64


@dataclass(frozen=True)
class Recipe:
    """Training options of a generator: the axes of the study."""

    method: str = "diffratio"  # diffratio, vsd, vsd exact teacher, exact
    divergence: str = "reverse_kl"
    clamp: float | None = None  # clamp of the divergence; None: its default
    weight: str = "sigma2"
    normalized: bool = False  # vsd: over the mean |x0 - teacher's x0| of each sample (DMD)
    noise_draws: int = 1
    online_steps: int = 1
    generator_law: str | None = None
    generator_rate: float = 1e-2
    online: Settings = field(default_factory=lambda: Settings(steps=0, rate=3e-3, beta1=0.0))
    energy: bool = False  # diffratio: networks with an energy head
    data_points: int | None = None  # number of fixed data points; None: draw from the law

    def divergence_row(self) -> Divergence:
        row = DIVERGENCES[self.divergence]
        return row if self.clamp is None else replace(row, clamp=self.clamp)


class MixtureGenerators:
    """S generators of K components each, with Adam's state."""

    def __init__(self, start: Mixture, rate: float) -> None:
        self.weights = start.weights
        self.means = start.means.clone().requires_grad_()
        self.log_stds = start.stds.log().clone().requires_grad_()
        self.rate = rate
        self.optimizer = torch.optim.Adam([self.means, self.log_stds], rate, betas=(0.0, 0.99), fused=True)

    def mixture(self) -> Mixture:
        return Mixture(self.weights, self.means, self.log_stds.exp())

    def frozen(self) -> Mixture:
        return Mixture(self.weights, self.means.detach(), self.log_stds.detach().exp())


def exact_slope(data: Mixture, generated: Mixture, x: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(log ratio [S, N], its gradient [S, N, d]) in closed form."""
    log_ratio = data.log_density(x, sigma) - generated.log_density(x, sigma)
    return log_ratio, data.score(x, sigma) - generated.score(x, sigma)


def generator_gradient(
    recipe: Recipe,
    fake: Tensor,
    noised: Tensor,
    sigma: Tensor,
    log_ratio: Tensor | None,
    slope: Tensor,
    teacher: Tensor | None,
) -> Tensor:
    """Term of a noise level in dL/dx0 [S, N, d] of ``fake``: -w(sigma) h(l) slope, as in ``objectives``.

    ``log_ratio`` [S, N] is None for methods without one; ``teacher`` is the teacher's x0 [S, N, d].
    """
    factor = -WEIGHTS[recipe.weight](sigma, SIGMA_DATA)
    if log_ratio is not None:
        factor = factor * recipe.divergence_row().factor(log_ratio)[0]
    if recipe.normalized:
        assert teacher is not None
        factor = factor / (fake - teacher).abs().mean(-1).clamp(min=1e-6)
    return factor[..., None] * slope


@dataclass
class Outcome:
    """Metrics of every training [S] at every evaluated step."""

    steps: list[int]
    figures: dict[str, list[list[float]]]


def train_generators(
    recipe: Recipe,
    data: Mixture,
    start: Mixture,
    networks: Ratios | Denoisers | None,
    teacher: Denoisers | None,
    *,
    steps: int,
    every: int,
    generator: torch.Generator,
) -> Outcome:
    """Run S trainings of ``steps`` generator updates; ``networks`` are trained online, in place.

    ``data`` and ``start`` have the leading axis S. The learning rates decay to a tenth along a cosine.
    """
    made = MixtureGenerators(start, recipe.generator_rate)
    real = data.sample(recipe.data_points, generator) if recipe.data_points else None
    online = recipe.online
    optimizer = None if networks is None else adam(networks, online.rate, online.beta1, online.decay)
    directions = unit_directions(DIRECTIONS, data.dimensions, generator).to(data.means.dtype)
    found = Outcome([], {})

    def sample_data(count: int) -> Tensor:
        if real is None:
            return data.sample(count, generator)
        chosen = torch.randint(real.shape[1], (len(real), count), generator=generator)
        return real.gather(1, chosen[..., None].expand(-1, -1, real.shape[2]))

    def estimate(noised: Tensor, sigma: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """(log ratio, its gradient, the teacher's x0) by the recipe's method."""
        frozen = made.frozen()
        if isinstance(networks, Ratios):
            return *networks.slope(noised, sigma), None
        if networks is None:
            return *exact_slope(data, frozen, noised, sigma), data.denoised(noised, sigma)
        with torch.no_grad():
            target = data.denoised(noised, sigma) if teacher is None else teacher(noised, sigma)
            return None, (target - networks(noised, sigma)) / sigma[..., None] ** 2, target

    def evaluate(step: int) -> None:
        frozen = made.frozen().double()
        figures = {"sliced_wasserstein": sliced_wasserstein(data.double(), frozen, directions.double())}
        if data.dimensions == 2:
            figures["kl_data_generator"] = kullback_leibler_2d(data.double(), frozen)
        found.steps.append(step)
        for name, values in figures.items():
            found.figures.setdefault(name, []).append(values.tolist())

    for step in range(steps):
        if step % every == 0:
            evaluate(step)
        progress = step / steps
        factor = 0.1 + 0.9 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item()) / 2
        if networks is not None and optimizer is not None:
            for _ in range(recipe.online_steps):
                fake = made.frozen().sample(online.batch, generator)
                sigma = draw_sigma(online.law, len(fake), online.batch, generator)
                if isinstance(networks, Ratios):
                    loss = ratio_loss(networks, sample_data(online.batch), fake, sigma, online, generator)
                else:
                    assert isinstance(networks, Denoisers)
                    loss = denoising_loss(networks, fake, sigma, generator, stable=online.stable)
                descend(optimizer, loss, online.rate * factor)
        fake = made.mixture().sample(online.batch, generator)
        gradient = torch.zeros_like(fake)
        for _ in range(recipe.noise_draws):
            sigma = draw_sigma(recipe.generator_law or online.law, len(fake), online.batch, generator)
            noised = fake.detach() + sigma[..., None] * torch.randn(fake.shape, generator=generator)
            log_ratio, slope, target = estimate(noised, sigma)
            gradient = gradient + generator_gradient(
                recipe, fake.detach(), noised, sigma, log_ratio, slope, target
            )
        made.optimizer.zero_grad(set_to_none=True)
        made.optimizer.param_groups[0]["lr"] = made.rate * factor
        fake.backward(gradient / (recipe.noise_draws * online.batch))
        made.optimizer.step()
    evaluate(steps)
    return found
