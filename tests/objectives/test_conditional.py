"""The conditional denoiser and the GAN, against closed forms; stable targets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from diffratio_fast import networks, ops
from diffratio_fast.config.objectives import OBJECTIVES
from diffratio_fast.config.presets import PRESETS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.errors import UserError
from diffratio_fast.networks.conditional import ConditionalDenoiser, copy_denoiser
from diffratio_fast.objectives import conditional, vsd
from diffratio_fast.objectives.denoising import denoising_errors, error_weight, posterior_mean
from diffratio_fast.training.generator_run import Trainer

BACKBONES: dict[str, dict[str, Any]] = {
    "edm:ddpmpp": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]},
    "edm:adm": {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": []},
    "mlp": {"width": 16, "depth": 2},
}
SHAPE, CLASSES = (2, 8, 8), 3
EVERY = pytest.mark.parametrize("backbone", BACKBONES)


def denoiser(backbone: str) -> Any:
    options = {"img_resolution": 8, "img_channels": 2, "label_dim": CLASSES} | BACKBONES[backbone]
    network = networks.from_published(backbone, options)
    networks.initialize(network, 0, stream=0)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-2:
                parameter.normal_(std=0.05)
    return network.eval()


def both(backbone: str, gain: float = 1.0) -> ConditionalDenoiser:
    network = ConditionalDenoiser(SHAPE, CLASSES, backbone=backbone, options=BACKBONES[backbone], gain=gain)
    networks.initialize(network, 0, stream=1)
    return network


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(4, *SHAPE), torch.rand(4) + 0.1, torch.arange(4) % CLASSES


@EVERY
def test_the_network_starts_as_the_denoiser_without_difference(backbone: str) -> None:
    source, network = denoiser(backbone), both(backbone)
    copy_denoiser(network, source)
    x, sigma, labels = inputs()
    with torch.no_grad():
        image, difference = network(x, sigma, labels)
        torch.testing.assert_close(image, source(x, sigma, labels))
        assert torch.equal(difference, torch.zeros_like(x))
    (network(x, sigma, labels)[1] * torch.randn_like(x)).sum().backward()
    grown = [name for name, p in network.named_parameters() if p.grad is not None and bool(p.grad.any())]
    assert grown and all(".difference." in name for name in grown)


@EVERY
def test_the_gain_is_a_factor_of_the_learning_rate(backbone: str) -> None:
    x, sigma, labels = inputs()
    target, found = torch.randn_like(x), []
    for gain in (1.0, 5.0):
        network = both(backbone, gain)
        for name, parameter in network.named_parameters():
            parameter.requires_grad_(".difference." in name)
        chosen = [p for p in network.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(chosen, lr=1e-3 / gain, eps=1e-20)
        for _ in range(3):
            optimizer.zero_grad()
            (network(x, sigma, labels)[1] - target).square().sum().backward()
            optimizer.step()
        found.append(network(x, sigma, labels)[1].detach())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-6)
    assert float(found[0].abs().max()) > 1e-4


@pytest.mark.parametrize("backbone", ["edm2:xs", "edm:ncsnpp"])
def test_networks_without_a_single_linear_read_out_are_refused(backbone: str) -> None:
    options = {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1}
    if backbone == "edm:ncsnpp":
        options["decoder_type"] = "skip"
    with pytest.raises(ValueError, match="read"):
        ConditionalDenoiser(SHAPE, CLASSES, backbone=backbone, options=options)


DATA_MEAN, FAKE_MEAN, VARIANCE = 0.2, -0.1, 0.16


def exact(x: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """(m, tau) of two normal laws with one variance: D = mean + share (x - mean)."""
    share = (VARIANCE / (VARIANCE + sigma**2)).reshape(-1, 1, 1, 1)
    real, fake = (mean + share * (x - mean) for mean in (DATA_MEAN, FAKE_MEAN))
    return (real + fake) / 2, real - fake


def test_the_optimum_is_the_pair_of_posterior_means_and_gives_the_score_difference() -> None:
    count = 40_000
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, count, 1, 1, 1, generator=generator, dtype=torch.float64) * VARIANCE**0.5
    real, fake = noise[0] + DATA_MEAN, noise[1] + FAKE_MEAN
    level = torch.full((count,), 0.5, dtype=torch.float64)
    index, labels = torch.arange(count), torch.zeros(count, dtype=torch.int64)
    scale = torch.ones(2, dtype=torch.float64, requires_grad=True)

    def network(x: Tensor, sigma: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        image, difference = exact(x, sigma, c)
        return image * scale[0], difference * scale[1]

    rest = (level, labels, ops.make_rng(1, 0), index)
    errors = conditional.conditional_errors(network, real, fake, *rest)
    (gradient,) = torch.autograd.grad(errors.mean(), scale)
    assert float(gradient.abs().max()) < 0.02
    sigma = torch.rand(count, 2, dtype=torch.float64) + 0.1
    found = conditional.score_difference(
        exact, fake, sigma, labels, ops.make_rng(1, 0), index, weight=sigma**2
    ).gradient
    # the scores differ by (mean - mean') / (variance + sigma^2) for every x
    expected = -(sigma**2 / (VARIANCE + sigma**2)).mean(1) * (DATA_MEAN - FAKE_MEAN)
    torch.testing.assert_close(found.flatten(), expected)


def test_stable_targets_keep_the_optimum_and_lower_the_variance() -> None:
    """The posterior mean of a large batch is close to the exact one; a single image is not."""
    count = 3000
    generator = torch.Generator().manual_seed(0)
    clean = DATA_MEAN + VARIANCE**0.5 * torch.randn(count, 1, 1, 1, generator=generator, dtype=torch.float64)
    level = torch.full((count,), 0.5, dtype=torch.float64)
    index, labels = torch.arange(count), torch.arange(count) % 2
    rng = ops.make_rng(3, 0)
    x = ops.add_noise(clean, level, rng, index, ops.Purpose.DENOISING_NOISE)
    best = DATA_MEAN + VARIANCE / (VARIANCE + 0.25) * (x - DATA_MEAN)
    stable = posterior_mean(x, clean, level, labels)
    assert float((stable - best).square().mean()) < 0.02 * float((clean - best).square().mean())
    for c in (0, 1):  # the mean of a class uses only its own images
        alone = posterior_mean(x[labels == c], clean[labels == c], level[labels == c], labels[labels == c])
        torch.testing.assert_close(stable[labels == c], alone)
    errors = denoising_errors(
        lambda *_: best, clean, level, labels, rng, index, ops.Purpose.DENOISING_NOISE, stable_targets=True
    )
    torch.testing.assert_close(errors, error_weight(level) * (best - stable).square().flatten(1).mean(1))
    student = vsd.student_errors(lambda *_: best, clean, level, labels, rng, index, stable_targets=True)
    assert float(student.mean()) < 0.9 * float(
        vsd.student_errors(lambda *_: best, clean, level, labels, rng, index).mean()
    )


def test_a_gan_descends_its_generators_loss() -> None:
    values = PRESETS["digits"] | OBJECTIVES["gan"].preset
    config = TrainConfig(**(values | {"objective": "gan", "precision": "float64", "batch_size": 8}))
    iteration = Trainer.new_iteration(config, open_dataset("digits"), torch.device("cpu"))
    ratio = iteration.state.ratio
    with torch.no_grad():
        for parameter in ratio.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    fake = torch.randn(8, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    labels, index = torch.arange(8), torch.arange(8)
    outcome, _ = iteration.generator_direction(fake, labels, index)
    sigma = torch.full((8,), 0.05, dtype=torch.float64)
    noised = ops.add_noise(fake, sigma, iteration.rng, index, ops.Purpose.NOISE_GENERATOR)
    (expected,) = torch.autograd.grad(softplus(-ratio(noised, sigma, labels)).sum(), fake)
    torch.testing.assert_close(outcome.gradient, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({"objective": "gan"}, "--divergence softened_reverse_kl"),
        (
            {"objective": "gan", "divergence": "softened_reverse_kl", "weight": "uniform"},
            "one noise level: --ratio-noise",
        ),
        ({"stable_targets": True}, "--stable-targets is an option of --objective vsd or conditional only"),
        ({"conditional_rate": 2.0}, "--conditional-rate is an option of --objective conditional only"),
        ({"objective": "conditional", "ratio_matched_pairs": True}, "--ratio-matched-pairs False"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict[str, Any], printed: str) -> None:
    with pytest.raises(UserError, match=printed):
        TrainConfig(**options)
    assert math.isfinite(TrainConfig().conditional_rate)
