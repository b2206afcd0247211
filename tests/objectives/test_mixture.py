"""DiffRatio on a plane with exact solutions: mixtures of Gaussians, their ratio and its gradient."""

import math

import pytest
import torch
from support.mixture import DATA, MODEL, SHAPE, draw, log_density

from diffratio_fast import ops
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.networks import initialize
from diffratio_fast.networks.mlp import MLPRatio
from diffratio_fast.objectives.diffratio import ratio_loss, score_difference
from diffratio_fast.objectives.held_out import pair_bounds


@pytest.mark.slow
def test_learned_score_difference_is_the_analytic_one() -> None:
    """Both steps of the method on exact samples: l and -grad l against closed forms, where they differ."""
    generator = torch.Generator().manual_seed(0)
    network = MLPRatio(SHAPE, 1, width=64, depth=3)
    initialize(network, seed=0, stream=1)
    steps = 1500
    optimizer = torch.optim.Adam(network.parameters(), 3e-3, betas=(0.5, 0.99))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batch = 512
    index, labels = torch.arange(batch), torch.zeros(batch, dtype=torch.int64)
    for step in range(steps):
        sigma = (torch.rand(batch, generator=generator) * math.log(10) + math.log(0.15)).exp()
        real, fake = draw(DATA, batch, generator), draw(MODEL, batch, generator)
        loss = ratio_loss(network, real, fake, sigma, labels, ops.make_rng(1, step), index).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    count = 4096
    index, labels = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    rng = ops.make_rng(2, 0)
    fake = draw(MODEL, count, generator)
    for level in (0.2, 0.3, 0.5):
        sigma = torch.full((count, 1), level)
        result = score_difference(
            network, fake, sigma, labels, rng, index,
            weight=torch.ones_like(sigma), divergence=DIVERGENCES["reverse_kl"],
        )  # fmt: skip
        noise = ops.normal(rng, index, SHAPE, ops.Purpose.NOISE_GENERATOR)
        noised = (fake + level * noise).double().requires_grad_()
        exact = log_density(DATA, noised, sigma[:, 0]) - log_density(MODEL, noised, sigma[:, 0])
        (slope,) = torch.autograd.grad(exact.sum(), noised)
        cosine = torch.nn.functional.cosine_similarity(
            result.gradient.flatten().double(), -slope.flatten(), 0
        )
        error = (result.gradient.double() + slope).detach().norm() / slope.norm()
        assert float(cosine) > 0.95, level
        assert float(error) < 0.35, level
        assert float((result.log_ratio[:, 0].double() - exact.detach()).abs().mean()) < 0.1, level


def test_bound_on_exact_ratio_is_the_divergence() -> None:
    """With the exact log ratio the bound equals the Jensen-Shannon divergence, here by quadrature."""
    level = 0.3
    axis = torch.linspace(-4, 4, 801, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis)
    sigma = torch.full((len(plane),), level)
    data, model = log_density(DATA, plane, sigma).exp(), log_density(MODEL, plane, sigma).exp()
    middle = (data + model) / 2
    cell = float(axis[1] - axis[0]) ** 2
    exact = (torch.xlogy(data, data / middle) + torch.xlogy(model, model / middle)).sum() * cell / 2

    generator = torch.Generator().manual_seed(3)
    count = 200_000
    sigma = torch.full((count,), level)
    noised = [
        draw(mixture, count, generator).flatten(1).double()
        + level * torch.randn(count, 2, generator=generator)
        for mixture in (DATA, MODEL)
    ]
    log_ratios = [log_density(DATA, x, sigma) - log_density(MODEL, x, sigma) for x in noised]
    assert abs(float(pair_bounds(*log_ratios).mean() - exact)) < 2e-3
