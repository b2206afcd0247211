"""The divergences, weights and noise laws as tables, and the two steps against closed forms."""

import math

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import softplus

from diffratio_fast import ops
from diffratio_fast.config.noise_laws import parse_noise_law
from diffratio_fast.config.train import WEIGHT_NAMES
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.errors import UserError
from diffratio_fast.objectives.augmentation import flip, roll, roll_shifts
from diffratio_fast.objectives.bin_means import BINS, bin_sums, bins, initial_means, update_means
from diffratio_fast.objectives.diffratio import ratio_loss, score_difference
from diffratio_fast.objectives.held_out import pair_bounds
from diffratio_fast.objectives.matching import matched
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.objectives.weights import LOSS_WEIGHTS, WEIGHTS, loss_weight

SIGMA_DATA = 0.5


def test_tables_are_the_options() -> None:
    assert tuple(WEIGHTS) == WEIGHT_NAMES


@pytest.mark.parametrize("name", DIVERGENCES)
def test_h_is_the_second_derivative_of_the_stated_f(name: str) -> None:
    divergence = DIVERGENCES[name]
    log_ratio = torch.linspace(-2.5, 2.5, 21, dtype=torch.float64)
    rho = log_ratio.exp().requires_grad_()
    (first,) = torch.autograd.grad(divergence.f(rho).sum(), rho, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), rho)
    expected = second * rho.detach() ** 2 / divergence.constant
    torch.testing.assert_close(divergence.h(log_ratio), expected, rtol=1e-9, atol=1e-12)
    at_one = divergence.f(torch.ones((), dtype=torch.float64))
    assert abs(float(at_one)) < 1e-12  # a divergence of equal distributions is zero


@pytest.mark.parametrize("name", ["forward_kl", "squared_hellinger", "jeffreys"])
def test_clamp_acts_inside_h_and_is_reported(name: str) -> None:
    divergence = DIVERGENCES[name]
    bound = divergence.clamp
    assert bound is not None
    log_ratio = torch.tensor([-20.0, 0.5, 20.0])
    h, clamped = divergence.factor(log_ratio)
    torch.testing.assert_close(h, divergence.h(torch.tensor([-bound, 0.5, bound])))
    assert clamped.tolist() == [True, False, True]


def test_weights_have_their_closed_forms() -> None:
    sigma = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    assert WEIGHTS["uniform"](sigma, 0.5).tolist() == [1, 1, 1]
    torch.testing.assert_close(WEIGHTS["sigma2"](sigma, 0.5), sigma * sigma)
    assert float(WEIGHTS["bounded"](sigma, 0.5)[1]) == pytest.approx(0.5)
    assert float(WEIGHTS["dmd"](sigma, 0.5)[1]) == pytest.approx(math.sqrt(0.5))


@pytest.mark.parametrize(
    ("text", "median", "low", "high"),
    [
        ("loguniform(0.1, 10)", 1.0, 0.1, 10.0),
        ("lognormal(-1.2, 1.2)", math.exp(-1.2), 0.0, math.inf),
        ("karras(0.002, 80, 7)", ((0.002 ** (1 / 7) + 80 ** (1 / 7)) / 2) ** 7, 0.002, 80.0),
        ("karras(1, 3, 1, 0.25, 0.75)", 2.0, 1.5, 2.5),
        ("flow_uniform()", 1.0, 0.0, math.inf),
        ("flow_uniform(0.2, 0.8)", 1.0, 0.25, 4.0),
        ("flow_logitnormal(0.3, 1)", math.exp(0.3), 0.0, math.inf),
    ],
)
def test_noise_laws(text: str, median: float, low: float, high: float) -> None:
    law = parse_noise_law(text)
    middle = law.quantile(torch.tensor([0.5], dtype=torch.float64))
    assert float(middle) == pytest.approx(median, rel=1e-12)
    assert law.low == pytest.approx(low) and law.high == pytest.approx(high)
    assert parse_noise_law(law.name).name == law.name
    sigma, uniforms = sample_sigma(
        law, ops.make_rng(3, 4), torch.arange(2000), ops.Purpose.SIGMA_RATIO, draws=2
    )
    assert sigma.shape == uniforms.shape == (2000, 2) and sigma.dtype == torch.float32
    assert bool((sigma >= low * (1 - 1e-6)).all()) and bool((sigma <= high * (1 + 1e-6)).all())
    share_below = float((sigma < median).double().mean())
    assert abs(share_below - 0.5) < 5 * 0.5 / math.sqrt(4000)


@pytest.mark.parametrize(
    "text",
    ["", "gauss(1, 2)", "loguniform", "loguniform(1)", "loguniform(2, 1)", "lognormal(0, 0)", "karras(a, b)"],
)
def test_noise_law_errors_are_one_line(text: str) -> None:
    with pytest.raises(UserError) as error:
        parse_noise_law(text)
    assert "\n" not in str(error.value)


def test_support_is_compared() -> None:
    wide, narrow = parse_noise_law("loguniform(0.1, 2)"), parse_noise_law("karras(0.1, 1)")
    assert wide.covers(narrow) and wide.covers(wide) and not narrow.covers(wide)
    assert parse_noise_law("lognormal(0, 1)").covers(wide)


class GaussianRatio(torch.nn.Module):
    """The exact log ratio of N(m_c, s^2 + sigma^2) to N(0, t^2 + sigma^2), isotropic, class c shifting m."""

    def __init__(self, s: float, t: float, shift: float) -> None:
        super().__init__()
        self.s, self.t = s, t
        self.shift = torch.nn.Parameter(torch.tensor(shift, dtype=torch.float64))

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        data, model = self.s**2 + sigma**2, self.t**2 + sigma**2
        mean = self.shift * labels
        x = x.flatten(1)
        n = x.shape[1]
        return (
            -((x - mean[:, None]) ** 2).sum(1) / (2 * data)
            + (x**2).sum(1) / (2 * model)
            + n / 2 * (model / data).log()
        )


def setting(batch: int = 6, draws: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    shape = (batch, 2, 3, 3)
    return {
        "fake": torch.randn(shape, generator=generator, dtype=torch.float64),
        "real": torch.randn(shape, generator=generator, dtype=torch.float64),
        "sigma": torch.rand(batch, draws, generator=generator, dtype=torch.float64) + 0.2,
        "labels": torch.arange(batch) % 3,
        "rng": ops.make_rng(11, 12),
        "index": torch.arange(batch) + 40,
    }


@pytest.mark.parametrize("name", DIVERGENCES)
def test_score_difference_equals_the_closed_form(name: str) -> None:
    x = setting()
    network = GaussianRatio(0.6, 0.9, 0.4)
    divergence = DIVERGENCES[name]
    weight = WEIGHTS["sigma2"](x["sigma"], SIGMA_DATA)
    mean_h = torch.rand(6, 3, dtype=torch.float64) + 0.5
    result = score_difference(
        network, x["fake"], x["sigma"], x["labels"], x["rng"], x["index"],
        weight=weight, divergence=divergence, h_mean=mean_h,
    )  # fmt: skip
    expected = torch.zeros_like(x["fake"])
    for k in range(3):
        sigma = x["sigma"][:, k]
        noise = ops.normal(x["rng"], x["index"], (2, 3, 3), ops.Purpose.NOISE_GENERATOR, draw=k).double()
        noised = x["fake"] + sigma.reshape(-1, 1, 1, 1) * noise
        log_ratio = network(noised, sigma, x["labels"]).detach()
        mean = (0.4 * x["labels"].double()).reshape(-1, 1, 1, 1)
        spread = sigma.reshape(-1, 1, 1, 1) ** 2
        slope = -(noised - mean) / (0.36 + spread) + noised / (0.81 + spread)
        h, clamped = divergence.factor(log_ratio)
        expected -= (weight[:, k] * h / mean_h[:, k]).reshape(-1, 1, 1, 1) * slope / 3
        torch.testing.assert_close(result.log_ratio[:, k], log_ratio, rtol=1e-10, atol=1e-10)
        assert torch.equal(result.clamped[:, k], clamped)
    torch.testing.assert_close(result.gradient, expected, rtol=1e-10, atol=1e-10)
    assert network.shift.grad is None and not result.gradient.requires_grad


def test_ratio_loss_gradient_passes_gradcheck() -> None:
    x = setting()
    network = GaussianRatio(0.6, 0.9, 0.4)

    def loss(shift: Tensor) -> Tensor:
        def call(noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
            return torch.func.functional_call(network, {"shift": shift}, (noised, sigma, labels))

        arguments = (x["real"], x["fake"], x["sigma"][:, 0], x["labels"], x["rng"], x["index"])
        return ratio_loss(call, *arguments).loss

    assert torch.autograd.gradcheck(loss, (torch.tensor(0.4, dtype=torch.float64, requires_grad=True),))


def test_ratio_loss_shares_the_noise_of_a_pair_and_gives_the_fakes_no_gradient() -> None:
    x = setting()
    network, fake = GaussianRatio(0.6, 0.9, 0.4), x["fake"].requires_grad_()
    rest = (x["sigma"][:, 0], x["labels"], x["rng"], x["index"])
    ratio_loss(network, x["real"], fake, *rest).loss.backward()
    assert fake.grad is None
    shared = ratio_loss(network, fake, fake, *rest)
    assert torch.equal(shared.log_ratio_real, shared.log_ratio_fake)
    separate = ratio_loss(network, fake, fake, *rest, purposes=ops.SEPARATE_NOISE)
    assert torch.equal(separate.log_ratio_real, shared.log_ratio_real)
    assert not torch.equal(separate.log_ratio_real, separate.log_ratio_fake)


def slopes(purposes: tuple[ops.Purpose, ops.Purpose], sigma: float, count: int = 4000) -> Tensor:
    """Gradients of the loss of a pair with respect to ``shift``, for separate pairs: float64 [count]."""
    generator = torch.Generator().manual_seed(5)
    real, fake = torch.randn(2, count, 1, 1, 1, generator=generator, dtype=torch.float64)
    shift = torch.full((count,), 0.4, dtype=torch.float64, requires_grad=True)

    def ratio(noised: Tensor, level: Tensor, labels: Tensor) -> Tensor:
        mean = shift[labels % count].reshape(-1, 1, 1, 1)
        return (noised * mean).flatten(1).sum(1) / (0.25 + level**2)

    index = torch.arange(count)
    level = torch.full((count,), sigma, dtype=torch.float64)
    loss = ratio_loss(
        ratio, real / 2 + 0.2, fake / 2, level, index, ops.make_rng(2, 0), index, purposes=purposes
    ).loss
    (gradient,) = torch.autograd.grad(loss * count, shift)
    return gradient


@pytest.mark.parametrize(("sigma", "least"), [(0.1, 1.0), (0.8, 1.5), (3.2, 10.0)])
def test_shared_noise_keeps_the_gradient_and_lowers_its_variance(sigma: float, least: float) -> None:
    shared, separate = slopes(ops.SHARED_NOISE, sigma), slopes(ops.SEPARATE_NOISE, sigma)
    error = math.sqrt(float(shared.var() + separate.var()) / len(shared))
    assert abs(float(shared.mean() - separate.mean())) < 4 * error
    assert float(separate.var() / shared.var()) > least


def test_a_weight_scales_each_pair_and_has_mean_one_over_the_law() -> None:
    x = setting()
    arguments = (x["real"], x["fake"], x["sigma"][:, 0], x["labels"], x["rng"], x["index"])
    network = GaussianRatio(0.6, 0.9, 0.4)
    weight = torch.rand(len(x["index"]), dtype=torch.float64)
    plain = ratio_loss(network, *arguments)
    expected = weight * (softplus(-plain.log_ratio_real) + softplus(plain.log_ratio_fake))
    found = ratio_loss(network, *arguments, weight=weight).loss
    torch.testing.assert_close(found.detach(), expected.mean())
    law = parse_noise_law("loguniform(0.1, 10)")
    for name in LOSS_WEIGHTS:
        levels = law.quantile(torch.rand(200_000, dtype=torch.float64))
        values = loss_weight(name, law, SIGMA_DATA)(levels)
        assert float(values.mean()) == pytest.approx(1, abs=4 * float(values.std()) / 400)
    rising = loss_weight("total_std", law, SIGMA_DATA)(torch.tensor([0.0, 0.5, 5.0]))
    assert float(rising[1] / rising[0]) == pytest.approx(math.sqrt(2))
    assert float(rising[2] / rising[0]) == pytest.approx(math.sqrt(101), rel=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 64])
def test_matched_pairs_are_nearer_within_their_label(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    real, fake = torch.randn(2, count, 1, 2, 2, generator=generator)
    labels = torch.randint(0, 3, (count,), generator=generator)
    order = matched(real, fake, labels)
    assert sorted(order.tolist()) == list(range(count))
    assert torch.equal(labels[order], labels)

    def cost(chosen: Tensor) -> float:
        return float((real - fake[chosen]).square().sum())

    squares = torch.cdist(real.flatten(1), fake.flatten(1)).square()
    squares = squares + 1e6 * (labels[:, None] != labels)
    best = cost(torch.as_tensor(linear_sum_assignment(squares.numpy())[1]))
    start = cost(torch.arange(count))
    assert best - 1e-4 <= cost(order) <= best + 0.2 * (start - best) + 1e-4


def test_bound_is_zero_for_equal_and_log_2_for_disjoint() -> None:
    assert float(pair_bounds(torch.zeros(4), torch.zeros(4)).mean()) == pytest.approx(0, abs=1e-7)
    far = torch.full((4,), 100.0)
    assert float(pair_bounds(far, -far).mean()) == pytest.approx(math.log(2))
    assert float(pair_bounds(-far, far).mean()) < -50  # negatives are not clipped


def test_roll_is_undone_by_the_opposite_roll_and_has_the_transpose_as_its_gradient() -> None:
    x = torch.arange(2 * 3 * 4 * 5, dtype=torch.float64).reshape(2, 3, 4, 5).requires_grad_()
    shifts = torch.tensor([[1, -2], [0, 3]])
    rolled = roll(x, shifts)
    expected = torch.stack([x[0].roll((1, -2), (1, 2)), x[1].roll((0, 3), (1, 2))])
    assert torch.equal(rolled, expected)
    assert torch.equal(roll(rolled, -shifts), x)
    upstream = torch.randn_like(rolled)
    (gradient,) = torch.autograd.grad(rolled, x, upstream)
    assert torch.equal(gradient, roll(upstream, -shifts))


def test_roll_shifts_and_flips_come_with_their_probability() -> None:
    rng, index = ops.make_rng(0, 7), torch.arange(20_000)
    shifts = roll_shifts(rng, index, 0.6, 2)
    assert set(shifts.unique().tolist()) == {-2, -1, 0, 1, 2}
    still = float((shifts == 0).all(1).double().mean())
    assert abs(still - (0.4 + 0.6 / 25)) < 0.02
    x = torch.arange(4.0).expand(20_000, 1, 1, 4)
    flipped = flip(x, rng, index, 0.3)[:, 0, 0, 0] == 3
    assert abs(float(flipped.double().mean()) - 0.3) < 0.02
    assert flip(x, rng, index, 0.0) is x


def test_bin_means_follow_each_bin() -> None:
    means = initial_means(torch.device("cpu"))
    uniforms = torch.tensor([[0.0, 1 - 1e-12], [0.03, 0.5]], dtype=torch.float64)
    bin_of = bins(uniforms)
    assert bin_of.tolist() == [[0, BINS - 1], [0, BINS // 2]]
    for _ in range(2000):
        update_means(means, bin_sums(bin_of, torch.tensor([[1.0, 5.0], [3.0, 7.0]])))
    assert float(means[0]) == pytest.approx(2, rel=1e-3)
    assert float(means[-1]) == pytest.approx(5, rel=1e-3)
    assert float(means[BINS // 2]) == pytest.approx(7, rel=1e-3)
    assert float(means[1]) == 1


def test_slope_penalty_is_the_squared_slope_of_a_linear_ratio() -> None:
    """For l = <a, x> its mean is sigma^2 |a|^2 exactly in expectation, for any finite difference."""
    count = 40_000
    direction = torch.tensor([0.3, -1.2, 0.7], dtype=torch.float64).reshape(1, 3, 1, 1)

    def ratio(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return (direction * x).sum((1, 2, 3))

    x = torch.zeros(count, 3, 1, 1, dtype=torch.float64)
    sigma = torch.full((count,), 0.7, dtype=torch.float64)
    labels, index = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    plain, penalized = (
        ratio_loss(ratio, x, x, sigma, labels, ops.make_rng(0, 1), index, gradient_penalty=weight).loss
        for weight in (0.0, 2.0)
    )
    expected = 2.0 * 0.49 * float(direction.square().sum())
    assert float(penalized - plain) == pytest.approx(expected, rel=0.02)  # 80,000 squares of normals
