"""The verifier and its calibration against closed forms, on a plane with a known density ratio."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from support.mixture import DATA, SHAPE, draw, log_density
from torch import Tensor, nn

from diffratio_fast.config.noise_laws import loguniform
from diffratio_fast.networks import initialize
from diffratio_fast.networks.generate import generate
from diffratio_fast.networks.mlp import MLPRatio
from diffratio_fast.objectives.refit import RefitOptions, refit
from diffratio_fast.verifier.calibration import (
    Calibration,
    Estimate,
    auc,
    calibrate,
    calibration,
    effective_sample_size,
)
from diffratio_fast.verifier.noise_level import candidate_sigmas, choose_sigma
from diffratio_fast.verifier.selection import Verifier, effective_share, select

# deliberately wrong: one component three times too frequent, one shifted, all too wide
WRONG = (torch.tensor([[0.6, 0.0]] * 3 + [[-0.3, 0.5], [-0.2, -0.6]]), 0.22)
SIGMA = 0.1
AXIS = torch.linspace(-1.9, 1.9, 191, dtype=torch.float64)
COARSE = 10  # cells of the plane's grid along a bin of the histograms


class Mixture(nn.Module):
    """A generator of a mixture of Gaussians: the first number of a latent selects the component."""

    latent_shape = (3,)
    means: Tensor

    def __init__(self, mixture: tuple[Tensor, float]) -> None:
        super().__init__()
        self.means, self.std = nn.Parameter(mixture[0]), mixture[1]  # type: ignore[assignment]

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        share = torch.special.ndtr(latents[:, 0].double())
        chosen = (share * len(self.means)).long().clamp(max=len(self.means) - 1)
        return (self.means[chosen] + self.std * latents[:, 1:]).reshape(-1, *SHAPE)


def exact_ratio(noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
    return log_density(DATA, noised, sigma) - log_density(WRONG, noised, sigma)


def on_plane(mixture: tuple[Tensor, float], sigma: float) -> Tensor:
    """Probability of every cell of the grid, float64 [191, 191]."""
    plane = torch.cartesian_prod(AXIS, AXIS)
    cell = float(AXIS[1] - AXIS[0]) ** 2
    density = log_density(mixture, plane, torch.full((len(plane),), sigma, dtype=torch.float64)).exp()
    return (density * cell).reshape(len(AXIS), len(AXIS))


def resampled_law(sigma: float) -> Tensor:
    """The law of ``resample`` with the exact ratio and many candidates: q(x) E[p_sigma / q_sigma | x]."""
    kernel = torch.exp(-((AXIS[:, None] - AXIS) ** 2) / (2 * sigma**2))
    kernel = kernel / kernel.sum(1, keepdim=True)
    weight = kernel @ (on_plane(DATA, sigma) / on_plane(WRONG, sigma)) @ kernel.T
    law = on_plane(WRONG, 0.0) * weight
    assert abs(float(law.sum()) - 1) < 5e-3  # the formula is normalized
    return law / law.sum()


def histogram(law: Tensor) -> Tensor:
    return law[:-1, :-1].unfold(0, COARSE, COARSE).unfold(1, COARSE, COARSE).sum((-1, -2))


def counted(x: Tensor) -> Tensor:
    """Shares of the samples [B, 1, 1, 2] in the bins of ``histogram``."""
    half = float(AXIS[1] - AXIS[0]) / 2
    edges = [AXIS[::COARSE] - half] * 2
    return torch.histogramdd(x.reshape(-1, 2).double(), edges)[0] / len(x)  # type: ignore[arg-type]


def variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)


@pytest.fixture(scope="module")
def refitted() -> MLPRatio:
    """An untrained ratio network, fitted against the wrong generator."""
    torch.manual_seed(0)
    network = MLPRatio(SHAPE, 1, width=64, depth=3)
    initialize(network, seed=0, stream=1)
    generator = torch.Generator().manual_seed(0)

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield draw(DATA, 512, generator), torch.zeros(512, dtype=torch.int64)

    held_out = draw(DATA, 2048, generator), torch.zeros(2048, dtype=torch.int64)
    options = RefitOptions(steps=800, learning_rate=5e-3, check_every=200)
    result = refit(
        network, Mixture(WRONG), batches(), held_out, loguniform(0.08, 1.0), options=options, seed=3
    )
    assert result.checks[0] == (0, pytest.approx(0, abs=1e-6))
    assert result.bound == max(bound for _, bound in result.checks) > 0.03
    assert not network.last.weight.any()  # the input network is unchanged
    return result.network  # type: ignore[return-value]


@pytest.mark.slow
def test_resample_draws_from_its_closed_form_law_and_nears_the_data(refitted: MLPRatio) -> None:
    """With the exact ratio the histogram is the law's; with the refitted one it is close, and improves."""
    count = 8192
    labels = torch.zeros(count, dtype=torch.int64)
    generator = Mixture(WRONG)
    data, law = histogram(on_plane(DATA, 0.0)), histogram(resampled_law(SIGMA))
    noise = variation(counted(draw(DATA, count, torch.Generator().manual_seed(5))), data)
    plain = counted(generate(generator, labels, seed=1))
    with torch.no_grad():
        exact, learned = (
            select(Verifier(ratio, SIGMA, draws=8), generator, labels, seed=1, candidates=16)
            for ratio in (exact_ratio, refitted)
        )
    assert variation(histogram(on_plane(WRONG, 0.0)), data) > 0.3
    assert variation(law, data) < 0.5 * variation(plain, data)  # the theoretical improvement
    assert variation(counted(exact.images), law) < 1.5 * noise
    assert variation(counted(learned.images), law) < 0.08 + noise
    assert variation(counted(learned.images), data) < 0.6 * variation(plain, data)  # the improvement
    assert exact.effective_share > 0.2


def test_best_prefers_precision(refitted: MLPRatio) -> None:
    labels = torch.zeros(2000, dtype=torch.int64)
    with torch.no_grad():
        best = select(Verifier(refitted, SIGMA, "best", draws=8), Mixture(WRONG), labels, 1, candidates=8)
    zero = torch.zeros(len(labels))
    plain = generate(Mixture(WRONG), labels, seed=1)
    gain = log_density(DATA, best.images, zero).mean() - log_density(DATA, plain, zero).mean()
    assert float(gain) > 0.5


def test_calibration_of_the_exact_ratio_and_of_wrong_ones() -> None:
    generator = torch.Generator().manual_seed(2)
    real, labels = draw(DATA, 4096, generator), torch.zeros(4096, dtype=torch.int64)

    def rows(change) -> list[Calibration]:  # type: ignore[no-untyped-def]
        ratio = lambda *inputs: change(exact_ratio(*inputs))  # noqa: E731
        return calibrate(ratio, Mixture(WRONG), real, labels, [0.2, 0.5], seed=4, fakes=8192)

    for row in rows(lambda value: value):
        for estimate, target in ((row.generated_mean, 1), (row.data_mean, 1), (row.balance, 0)):
            assert abs(estimate.value - target) < 4 * estimate.error < 0.2
        for item in row.reliability:
            assert abs(item.predicted - item.observed) < 5 * 0.5 / math.sqrt(item.images) + 0.01
        assert 0.5 < row.auc < 0.9
    for row in rows(lambda value: value + 1):
        assert row.generated_mean.value == pytest.approx(math.e, rel=0.1)
        assert row.data_mean.value == pytest.approx(1 / math.e, rel=0.1)
        assert row.balance.value < -20 * row.balance.error
    assert rows(lambda value: 2 * value)[0].generated_mean.value > 1.1


def test_known_numbers_of_calibration() -> None:
    row = calibration(np.array([[0.0, 0.0], [2.0, 2.0]]), np.array([[0.0, 0.0], [-2.0, -2.0]]), 0.3)
    weights = np.array([1.0, math.exp(-2)])
    expected = Estimate(weights.mean(), weights.std(ddof=1) / math.sqrt(2))
    assert row.generated_mean == pytest.approx(expected) and row.data_mean == pytest.approx(expected)
    assert row.balance.value == pytest.approx(0)
    assert row.auc == pytest.approx((1 + 1 + 1 + 0.5) / 4)
    assert row.effective_sample_size == pytest.approx(weights.sum() ** 2 / (weights**2).sum() / 2)
    assert sum(item.images for item in row.reliability) == 8
    assert auc(np.array([1.0]), np.array([0.0])) == 1 and auc(np.zeros(3), np.zeros(2)) == 0.5
    assert effective_sample_size(np.zeros(7)) == pytest.approx(7)
    assert effective_sample_size(np.array([900.0, 0.0])) == pytest.approx(1)
    assert effective_share(torch.tensor([[900.0, 0.0]])) == pytest.approx(0.5)
    hopeless = calibration(np.full((3, 1), -2000.0), np.full((3, 1), 2000.0), 0.3).as_dict()
    assert hopeless["generated_mean"] == [None, None] and hopeless["auc"] == 0
    with pytest.raises(ValueError, match="two images"):
        calibration(np.zeros((1, 2)), np.zeros((5, 2)), 0.1)


def test_selection_depends_on_seed_and_number_only(refitted: MLPRatio) -> None:
    labels = torch.zeros(200, dtype=torch.int64)
    for how, candidates in (("resample", 5), ("best", 3)):
        tool = Verifier(refitted, 0.3, how, draws=2)
        with torch.no_grad():
            whole = select(tool, Mixture(WRONG), labels, 9, candidates)
            for start, end in ((0, 1), (50, 53), (84, 200)):
                part = select(tool, Mixture(WRONG), labels[start:end], 9, candidates, start)
                assert torch.equal(part.images, whole.images[start:end])
                assert torch.equal(part.log_weights, whole.log_weights[start:end])
            one = select(tool, Mixture(WRONG), labels, 9, 1)
        assert torch.equal(one.images, generate(Mixture(WRONG), labels, 9))


def test_noise_is_shared_by_candidates_where_they_are_compared() -> None:
    """Equal candidates get equal scores from ``best``, and different ones from ``resample``."""
    images = torch.zeros(2, 4, *SHAPE)
    number, index = torch.arange(2), torch.arange(8).reshape(2, 4)
    labels = torch.zeros(2, dtype=torch.int64)
    first = lambda x, sigma, c: x.flatten(1)[:, 0]  # noqa: E731
    shared = Verifier(first, 0.5, "best", draws=3).log_weights(images, labels, 0, number, index)
    own = Verifier(first, 0.5, "resample", draws=3).log_weights(images, labels, 0, number, index)
    assert (shared == shared[:, :1]).all() and shared[0, 0] != shared[1, 0]
    assert len(own.flatten().unique()) == 8


def test_resample_draws_by_weight() -> None:
    tool = Verifier(exact_ratio, 0.5)
    probabilities = torch.tensor([0.1, 0.0, 0.6, 0.3], dtype=torch.float64)
    chosen = tool.choose(probabilities.log().expand(20_000, 4) + 700, 0, torch.arange(20_000))
    shares = torch.bincount(chosen, minlength=4) / 20_000
    assert shares[1] == 0
    torch.testing.assert_close(shares.double(), probabilities, atol=0.015, rtol=0)


def row_at(sigma: float, mean: float, effective: float) -> Calibration:
    good = Estimate(1.0, 0.01)
    return Calibration(sigma, Estimate(mean, 0.01), good, Estimate(0.0, 0.01), 0.6, effective, ())


def test_the_rule_of_sigma() -> None:
    rows = [row_at(0.4, 1.0, 0.5), row_at(0.1, 1.3, 0.5), row_at(0.2, 1.0, 0.05), row_at(0.3, 0.95, 0.2)]
    asked: list[float | None] = []

    def distances(sigma: float | None) -> list[float]:
        asked.append(sigma)
        return {None: [1.0, 1.1, 1.2], 0.3: [1.5, 1.6, 1.8], 0.4: [1.0, 1.1, 1.2]}[sigma]

    chosen, checks = choose_sigma(rows, distances)
    assert chosen == 0.4 and asked == [None, 0.3, 0.4]
    assert [(c.calibrated, c.effective, c.no_worse) for c in checks] == [
        (False, True, False), (True, False, False), (True, True, False), (True, True, True),
    ]  # fmt: skip
    assert choose_sigma(rows[:3], distances)[0] == 0.4
    assert choose_sigma(rows[1:3], distances)[0] is None
    assert [check.as_dict()["chosen"] for check in checks] == [False, False, False, True]


def test_candidate_sigmas_lie_inside_the_law() -> None:
    sigmas = candidate_sigmas(loguniform(0.1, 1.0), 5)
    assert len(sigmas) == 5 and sigmas == sorted(sigmas) and 0.1 < sigmas[0] < sigmas[-1] < 1.0


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="--select worst: unknown"):
        Verifier(exact_ratio, 0.1, "worst")
    with pytest.raises(ValueError, match="sigma"):
        Verifier(exact_ratio, 0.0)
    with pytest.raises(ValueError, match="candidates"):
        select(Verifier(exact_ratio, 0.1), Mixture(WRONG), torch.zeros(1, dtype=torch.int64), 0, 0)
