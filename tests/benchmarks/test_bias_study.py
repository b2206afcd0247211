"""The studies of bias: closed forms of mixtures, the decomposition, and the study at a tiny size."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.studies import bias_parts, bias_settings, bias_study
from benchmarks.studies.batched_networks import (
    Denoisers,
    EnergyRatios,
    Ratios,
    matched_width,
    parameter_count,
)
from benchmarks.studies.bias_parts import Study, decompose
from benchmarks.studies.bias_training import Recipe, generator_gradient, train_generators
from benchmarks.studies.mixtures import (
    Mixture,
    clusters,
    elongated,
    kullback_leibler_2d,
    sliced_wasserstein,
    unit_directions,
)
from benchmarks.studies.score_estimators import (
    Settings,
    assignment,
    denoising_loss,
    draw_sigma,
    ratio_loss,
    train_ratio,
)
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.errors import UserError


def two() -> Mixture:
    means = torch.tensor([[[0.5, 0.2], [-0.4, 0.0]], [[0.0, 0.3], [0.1, -0.6]]], dtype=torch.float64)
    stds = torch.tensor([[0.2, 0.3], [0.25, 0.1]], dtype=torch.float64)
    return Mixture(torch.tensor([[0.3, 0.7], [0.5, 0.5]], dtype=torch.float64), means, stds)


def test_score_is_the_gradient_of_the_density_which_integrates_to_one() -> None:
    mixture = two()
    x = torch.randn(2, 6, 2, dtype=torch.float64).requires_grad_()
    sigma = 0.1 + torch.rand(2, 6, dtype=torch.float64)
    log_density = mixture.log_density(x, sigma)
    (slope,) = torch.autograd.grad(log_density.sum(), x)
    torch.testing.assert_close(mixture.score(x, sigma), slope, rtol=1e-9, atol=1e-9)
    axis = torch.linspace(-5, 5, 401, dtype=torch.float64)
    plane = torch.cartesian_prod(axis, axis).expand(2, -1, -1)
    total = mixture.log_density(plane, 0.3).exp().sum(1) * float(axis[1] - axis[0]) ** 2
    torch.testing.assert_close(total, torch.ones(2, dtype=torch.float64))


def test_denoised_is_the_posterior_mean() -> None:
    one = Mixture(
        torch.ones(1, dtype=torch.float64),
        torch.tensor([[0.4, -1.0]], dtype=torch.float64),
        torch.tensor([0.3], dtype=torch.float64),
    )
    x, sigma = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64) + 0.1
    share = (0.09 / (0.09 + sigma**2))[:, None]
    torch.testing.assert_close(one.denoised(x, sigma), one.means + share * (x - one.means))


def test_samples_have_the_mixture_s_moments() -> None:
    mixture = two()
    x = mixture.sample(200_000, torch.Generator().manual_seed(0))
    mean = (mixture.weights[..., None] * mixture.means).sum(1)
    torch.testing.assert_close(x.mean(1), mean, rtol=0, atol=5e-3)
    second = (mixture.weights[..., None] * (mixture.means**2 + mixture.stds[..., None] ** 2)).sum(1)
    torch.testing.assert_close((x**2).mean(1), second, rtol=0, atol=5e-3)


def test_distances_have_their_closed_forms() -> None:
    """A shift by t is at Wasserstein distance |<t, u>| in direction u; KL of Gaussians has a closed form."""
    generator = torch.Generator().manual_seed(0)
    data = clusters(5, 8, 0.2, generator)
    shift = torch.tensor([0.1, 0.0, -0.2, 0.05, 0.0], dtype=torch.float64)
    directions = unit_directions(20, 5, generator)
    moved = Mixture(data.weights, data.means + shift, data.stds)
    found = sliced_wasserstein(data, moved, directions, points=4000)
    torch.testing.assert_close(found, (directions @ shift).abs().mean(), rtol=2e-3, atol=1e-5)
    assert float(data.means.square().mean() + 0.2**2) == pytest.approx(0.25)
    one = torch.ones(1, dtype=torch.float64)
    a = Mixture(one, torch.tensor([[0.2, 0.1]], dtype=torch.float64), one * 0.3)
    b = Mixture(one, torch.tensor([[0.0, 0.0]], dtype=torch.float64), one * 0.4)
    exact = 2 * (math.log(0.4 / 0.3) + 0.09 / 0.32 - 0.5) + 0.05 / 0.32
    assert float(kullback_leibler_2d(a, b)) == pytest.approx(exact, abs=1e-6)


def test_decomposition_of_a_case_with_known_answer() -> None:
    """Estimates exact + b + noise of known variance: squared bias, variance and their sum."""
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    scale = float(exact.square().mean())
    bias = 0.5 * exact.flip(0)
    noise = 0.8 * torch.randn(6, 20_000, 2, generator=generator, dtype=torch.float64)
    row = decompose(exact + bias + noise, exact)
    assert row["bias2"] == pytest.approx(0.25, abs=0.02)
    assert row["variance"] == pytest.approx(0.64 / scale, rel=0.03)
    direct = float((bias + noise).square().mean()) / scale
    assert row["error2"] == pytest.approx(direct, rel=1e-9)  # an identity, not an estimate
    unbiased = decompose(exact + noise, exact)
    assert abs(unbiased["bias2"]) < 0.02 and unbiased["bias2_se"] > 0


def test_batched_networks_do_not_touch_one_another() -> None:
    """Training only the second does not change the first, and sizes match the counts."""
    generator = torch.Generator().manual_seed(0)
    ratio = Ratios(2, 3, 8, 2, generator)
    assert sum(p[0].numel() for p in ratio.parameters()) == parameter_count(3, 1, 8, 2)
    width = matched_width(3, 1, 2, 2000)
    assert parameter_count(3, 1, width, 2) <= 2000 < parameter_count(3, 1, width + 1, 2)
    before = [p.detach().clone() for p in ratio.parameters()]
    x = torch.randn(2, 10, 3, generator=generator)
    loss = ratio(x, torch.rand(2, 10))[1].sum()
    loss.backward()
    for parameter in ratio.parameters():
        assert parameter.grad is not None and not parameter.grad[0].any()
    ratio_again = Ratios(2, 3, 8, 2, torch.Generator().manual_seed(5))
    ratio_again.copy_(ratio)
    assert all(torch.equal(a, b) for a, b in zip(before, ratio_again.parameters(), strict=True))
    denoiser = Denoisers(2, 3, 8, 2, generator)
    start = denoiser(x, torch.full((2, 10), 0.5))
    torch.testing.assert_close(start, x / 2)  # c_skip at sigma_data; F starts at zero


def test_trained_ratio_nears_the_exact_one() -> None:
    data, made = (
        Mixture(m.weights.float(), m.means.float(), m.stds.float()) for m in (two(), two().noised(0.2))
    )
    generator = torch.Generator().manual_seed(0)
    ratio = Ratios(2, 2, 32, 2, generator)
    settings = Settings(400, batch=256, law="loguniform(0.2, 0.6)")
    train_ratio(
        ratio, lambda n: data.sample(n, generator), lambda n: made.sample(n, generator), settings, generator
    )
    x = made.noised(0.3).sample(2000, generator)
    sigma = torch.full((2, 2000), 0.3)
    found, _ = ratio.slope(x, sigma)
    exact = data.log_density(x, sigma) - made.log_density(x, sigma)
    assert float((found - exact).square().mean()) < 0.3 * float(exact.square().mean())


@pytest.mark.parametrize("divergence", ["reverse_kl", "jeffreys"])
def test_generator_gradient_follows_the_objective(divergence: str) -> None:
    """Weight, h and slope combined as in ``objectives.diffratio``."""
    sigma, log_ratio = torch.tensor([[0.5, 2.0]]), torch.tensor([[0.3, -1.0]])
    slope = torch.randn(1, 2, 3)
    nothing = torch.zeros(1, 2, 3)
    recipe = Recipe(divergence=divergence, weight="sigma2")
    found = generator_gradient(recipe, nothing, nothing, sigma, log_ratio, slope, None)
    h = DIVERGENCES[divergence].h(log_ratio)
    torch.testing.assert_close(found, -(sigma**2 * h)[..., None] * slope)


def test_exact_score_differences_bring_the_generator_to_the_data() -> None:
    data = Mixture(*(part.float() for part in vars(two()).values()))
    even = Mixture(torch.full((2, 2), 0.5), data.means, data.stds)
    start = Mixture(even.weights, 0.5 * even.means, torch.full((2, 2), 0.4))
    recipe = Recipe(method="exact", weight="bounded", generator_rate=1e-2)
    outcome = train_generators(
        recipe, even, start, None, None, steps=300, every=150, generator=torch.Generator().manual_seed(0)
    )
    distance: list[list[float]] = outcome.figures["sliced_wasserstein"]
    assert outcome.steps == [0, 150, 300]
    assert all(last < 0.3 * first for first, last in zip(distance[0], distance[-1], strict=True))


def test_noise_law_of_the_study() -> None:
    sigma: Tensor = draw_sigma("loguniform(0.1, 10)", 2, 5000, torch.Generator().manual_seed(0))
    assert sigma.shape == (2, 5000)
    assert float(sigma.log().mean()) == pytest.approx(0.0, abs=0.05)


def test_study_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seeds give the same rows; parts that are not recomputed stay in the file."""
    monkeypatch.setattr(bias_parts, "DIMENSIONS", (2,))
    monkeypatch.setattr(bias_parts, "POINTS", 64)
    monkeypatch.setattr(bias_study, "Study", lambda scale: Study(scale, seeds=3))
    monkeypatch.setattr(Study, "few_data", lambda self: iter(()))
    names = ("DiffRatio, jeffreys", "VSD, learned teacher", "VSD, exact teacher")
    monkeypatch.setattr(bias_parts, "RECIPES", {name: bias_parts.RECIPES[name] for name in names})
    path = tmp_path / "study.json"
    for parts in (["scores"], ["training"], ["scores"]):
        assert bias_study.main(["--scale", "0.002", "--json", str(path), "--only", *parts]) == 0
        kept = json.loads(path.read_text())
        if parts == ["scores"]:
            scores = kept["scores"]
    assert kept["scores"] == scores and [row["recipe"] for row in kept["training"]] == list(names)
    first = kept["scores"][0]
    assert first["error2"] == pytest.approx(first["bias2"] + first["variance"], rel=1e-3)
    assert {row["method"] for row in kept["scores"]} == {"DiffRatio", "DiffRatio, before", *names[1:]}
    with pytest.raises(UserError, match="--scale"):
        bias_study.main(["--scale", "2"])


def test_every_method_is_trained_with_the_choice_that_was_best_on_other_data(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for table, keep in (("HELD_OUT", 1), ("SETTINGS", 2), ("METHODS", 2)):
        some = dict(list(getattr(bias_settings, table).items())[-keep:])
        monkeypatch.setattr(bias_settings, table, some)
    monkeypatch.setattr(bias_settings, "GENERATOR_RATES", (1e-3,))
    rows = list(bias_settings.settings(Study(0.002, seeds=2)))
    tried = [row for row in rows if row["held_out"]]
    assert len(tried) == 2 * 4 and len(rows) == len(tried) + 2 * 2
    for row in rows[len(tried) :]:
        assert row["setting"] in bias_settings.SETTINGS
        ends = {
            (other["online"], other["weight"]): sum(other["sliced_wasserstein"][-1])
            for other in tried
            if other["recipe"] == row["recipe"]
        }
        assert ends[row["online"], row["weight"]] == min(ends.values())


def test_an_elongated_law_keeps_its_size() -> None:
    round_data = clusters(16, 8, 0.2, torch.Generator().manual_seed(0))
    data = elongated(round_data, 0.2, 8.0)
    assert float(data.means.square().mean()) + 0.2**2 == pytest.approx(0.25)
    extent = data.means.std(0) / round_data.means.std(0)
    assert float(extent[0] / extent[-1]) == pytest.approx(8.0)


def test_an_energy_head_starts_at_zero_and_is_as_large_as_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    network = EnergyRatios(2, 3, 8, 2, generator)
    assert sum(p[0].numel() for p in network.parameters()) == parameter_count(3, 4, 8, 2)
    x, sigma = torch.randn(2, 5, 3), torch.rand(2, 5) + 0.1
    assert not network(x, sigma).any()
    with torch.no_grad():
        network.last[1][:, 0, 1:] = torch.tensor([1.0, 2.0, 3.0])  # an F that is the same everywhere
    expected = x @ torch.tensor([1.0, 2.0, 3.0]) / (sigma**2 + 0.25).sqrt() / 3**0.5
    torch.testing.assert_close(network(x, sigma), expected)


def test_switches_of_the_losses() -> None:
    """Shared noise cancels between equal halves; an assignment pairs equal points; a target is a mean."""
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(2, 6, 3)
    order = torch.stack([torch.randperm(6), torch.randperm(6)])
    mixed = points.gather(1, order[..., None].expand(-1, -1, 3))
    found = assignment(points, mixed)
    torch.testing.assert_close(mixed.gather(1, found[..., None].expand(-1, -1, 3)), points)

    class Linear(Ratios):
        def __init__(self) -> None:
            pass

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            halves = x.chunk(2, 1)
            self.equal = bool(torch.equal(*halves))
            return x.sum(-1)

    ratio, sigma = Linear(), torch.ones(2, 6)
    for settings, equal in (
        (Settings(1, shared=True, matched=True), True),
        (Settings(1, shared=True), False),
        (Settings(1, matched=True), False),
    ):
        ratio_loss(ratio, points, mixed, sigma, settings, generator)
        assert ratio.equal == equal

    same = points[:, :1].expand(-1, 6, -1)  # the mean of equal points is the point

    class Exact(Denoisers):
        def __init__(self) -> None:
            pass

        def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
            return same

    assert float(denoising_loss(Exact(), same, sigma, generator, stable=True).max()) < 1e-10
