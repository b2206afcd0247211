"""Details of the published networks: details that are easy to get wrong; labels, dropout and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from support.published_networks import SONG, WIDE, error, randomized, tiny
from torch.nn import functional as F

from diffratio_fast import networks
from diffratio_fast.networks import edm2, unet

# Details that are easy to get wrong.


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_reads_rows_by_head_channel_and_role(heads: int) -> None:
    count, channels, side = 2, 8, 3
    x = torch.randn(count, channels, side, side, dtype=torch.float64)
    weight = torch.randn(3 * channels, channels, 1, 1, dtype=torch.float64)
    bias = torch.randn(3 * channels, dtype=torch.float64)
    proj = torch.randn(channels, channels, 1, 1, dtype=torch.float64)
    out = unet.attend(x, heads, (weight, bias), (proj, None))
    rows = F.conv2d(x, weight, bias).reshape(count, heads, channels // heads, 3, side * side)
    query, key, value = rows.unbind(3)
    weights = (torch.einsum("nhcq,nhck->nhqk", query, key) / math.sqrt(channels // heads)).softmax(-1)
    right = torch.einsum("nhqk,nhck->nhcq", weights, value).reshape(x.shape)
    assert torch.allclose(out, F.conv2d(right, proj))


def test_two_tap_filters_agree_with_the_general_ones() -> None:
    x = torch.randn(2, 3, 8, 6)
    kernel = unet.separable_filter([1, 1])
    assert torch.allclose(unet.downsample(x, None), unet.downsample(x, kernel), atol=1e-6)
    assert torch.allclose(unet.upsample(x, None), unet.upsample(x, kernel), atol=1e-6)
    assert not unet.is_box([1, 3]) and not unet.is_box([1, 1, 1, 1])


@torch.no_grad()
def test_forced_normalization_in_training_mode_only() -> None:
    network, data = tiny("edm2_tiny")
    layers = [module for module in network.modules() if isinstance(module, edm2.MPConv)]
    before = [layer.weight.clone() for layer in layers]
    out = network(data["x"], data["sigma"], data["labels"])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    network.train()
    trained = network(data["x"], data["sigma"], data["labels"])
    assert error(trained, out) < 1e-4  # normalizing twice equals normalizing once, up to eps
    for layer, weight in zip(layers, before, strict=True):
        if layer is network.logvar_linear:
            continue
        rms = layer.weight.flatten(1).square().mean(1).sqrt()
        assert torch.allclose(rms, torch.ones_like(rms), atol=5e-4)
        assert not torch.equal(layer.weight, weight)
    network.log_variance(data["sigma"])
    assert network.logvar_linear.weight.square().mean() == pytest.approx(1, abs=1e-3)


def test_two_training_passes_before_one_backward() -> None:
    network, data = tiny("edm2_tiny")
    network.train()
    first = network(data["x"], data["sigma"], data["labels"])
    second = network(-data["x"], data["sigma"], data["labels"])
    (first.square().mean() + second.square().mean()).backward()
    assert all(p.grad is not None for name, p in network.named_parameters() if "logvar" not in name)


def test_log_variance() -> None:
    network, data = tiny("edm2_tiny")
    fourier, weight = network.logvar_fourier, network.logvar_linear.weight
    angle = data["sigma"][:, None].log() / 4 * fourier.freqs + fourier.phases
    unit = weight / weight.square().mean().sqrt()
    right = (math.sqrt(2) * angle.cos() * unit / math.sqrt(128)).sum(1)
    out = network.log_variance(data["sigma"])
    assert out.shape == (3,) and torch.allclose(out, right, atol=1e-3)


@torch.no_grad()
def test_an_edm2_network_starts_without_output_and_an_edm_network_nearly_so() -> None:
    x, sigma = torch.randn(2, 2, 16, 16), torch.tensor([0.1, 4.0])
    c_skip = (0.25 / (sigma**2 + 0.25)).reshape(-1, 1, 1, 1)
    for architecture in ("edm2:tiny", "edm:adm"):
        assert torch.equal(networks.from_published(architecture, WIDE)(x, sigma), c_skip * x)
    out = networks.from_published("edm:ddpmpp", SONG)(x, sigma) - c_skip * x
    assert 0 < out.abs().max() < 1e-3


# Labels, dropout, errors.


@pytest.mark.parametrize("name", ["edm_ddpmpp_tiny", "edm_adm_tiny", "edm2_tiny"])
@torch.no_grad()
def test_labels_as_numbers_vectors_or_none(name: str) -> None:
    network, data = tiny(name)
    numbers = data["labels"].argmax(1)
    call = lambda labels: network(data["x"], data["sigma"], labels)  # noqa: E731
    assert torch.equal(call(numbers), call(data["labels"]))
    assert torch.equal(call(None), call(torch.zeros_like(data["labels"])))
    assert error(call(numbers.roll(1)), data["denoised"]) > 1e-3
    assert error(call(None), data["denoised"]) > 1e-3
    for bad in (numbers + network.label_dim, numbers - 10):
        with pytest.raises(ValueError, match="is out of range"):
            call(bad)
    with pytest.raises(ValueError, match="labels must be"):
        call(data["labels"][:, :-1])
    with pytest.raises(ValueError, match="2 labels for 3 images"):
        call(numbers[:2])


@torch.no_grad()
def test_a_network_without_classes_ignores_labels_and_augment_labels_are_optional() -> None:
    network, data = tiny("edm_ncsnpp_tiny")
    assert torch.equal(
        network(data["x"], data["sigma"], torch.tensor([0, 1, 7])), network(data["x"], data["sigma"])
    )
    augmented = network(data["x"], data["sigma"], None, torch.ones(3, 9))
    assert error(augmented, data["denoised"]) > 1e-3
    with pytest.raises(ValueError, match="no augment labels"):
        tiny("edm2_tiny")[0](torch.zeros(1, 4, 16, 16), torch.ones(1), None, torch.zeros(1, 9))


@torch.no_grad()
def test_one_noise_level_for_all_images() -> None:
    network, data = tiny("edm_adm_tiny")
    one = network(data["x"], torch.tensor(0.7), data["labels"])
    assert torch.equal(one, network(data["x"], torch.full((3,), 0.7), data["labels"]))
    with pytest.raises(ValueError, match="2 noise levels for 3 images"):
        network(data["x"], torch.ones(2), data["labels"])
    with pytest.raises(ValueError, match=r"x must be \[N, 3, H, W\]"):
        network(data["x"][:, :2], torch.ones(3), data["labels"])


@pytest.mark.parametrize("architecture", ["edm:ddpmpp", "edm:adm", "edm2:tiny"])
@torch.no_grad()
def test_dropout_and_label_dropout_in_training_mode_only(architecture: str) -> None:
    changes = [{"dropout": 0.5}] + ([{"label_dropout": 1.0}] if architecture != "edm2:tiny" else [])
    x, sigma, labels = torch.randn(2, 2, 16, 16), torch.ones(2), torch.tensor([0, 1])
    for change in changes:
        network = randomized(architecture, SONG | change)
        quiet = network(x, sigma, labels)
        assert torch.equal(network(x, sigma, labels), quiet)
        network.train()
        assert error(network(x, sigma, labels), quiet) > 1e-3
        if "label_dropout" in change:
            assert torch.equal(network(x, sigma, labels), network(x, sigma, None))


@pytest.mark.parametrize(
    ("architecture", "change", "message"),
    [
        ("vdm:x", {}, "unknown architecture 'vdm:x'"),
        ("edm:unet", {}, "expected a variant of ddpmpp, ncsnpp, adm"),
        ("edm2:huge", {"model_channels": ...}, "expected a variant of xxs, xs, s"),
        ("edm:adm", {"resample_filter": [1, 1]}, "unknown option 'resample_filter'"),
        ("edm2:xs", {"depth": 3}, "unknown option 'depth'"),
        ("edm2:xs", {"unet_kwargs": {}}, "unknown option 'unet_kwargs'"),
        ("edm:adm", {"model_type": "SongUNet"}, "contradicts"),
        ("edm:x", {"model_type": "UViT"}, "model_type must be one of"),
        ("edm:ddpmpp", {"encoder_type": "dense"}, "encoder_type must be one of standard, skip, residual"),
        ("edm:ddpmpp", {"img_channels": ...}, "has no 'img_channels'"),
        ("edm:ddpmpp", {"channel_mult": [1, 1.5]}, "channel_mult must be a list of integers"),
        ("edm:ddpmpp", {"channel_mult": []}, "channel_mult"),
        ("edm:ddpmpp", {"dropout": 2}, "dropout must be a number from 0 to 1"),
        ("edm:ddpmpp", {"model_channels": "16"}, "model_channels must be an integer"),
        ("edm:ddpmpp", {"num_blocks": True}, "num_blocks must be an integer"),
        ("edm:ddpmpp", {"img_resolution": 15}, "img_resolution 15 cannot be halved 1 times"),
        ("edm:ddpmpp", {"resample_filter": [1, 2, 1]}, "even number of taps"),
        ("edm2:x", {"resample_filter": [1, 2, 1]}, "even number of taps"),
        ("edm:ddpmpp", {"model_channels": 2}, "groups of four"),
        ("edm:adm", {"sigma_data": 0}, "sigma_data must be a number above 0"),
        ("edm2:x", {"model_channels": 200, "attn_resolutions": [16]}, "200 channels cannot be divided by 3"),
    ],
)
def test_invalid_options_raise(architecture: str, change: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in (SONG | change).items() if value is not ...}
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[")):
        networks.from_published(architecture, config)


@pytest.mark.parametrize("config", ["{", "[]", "3", 7])
def test_a_configuration_that_is_none(config: Any) -> None:
    with pytest.raises(ValueError, match="configuration"):
        networks.from_published("edm2:xs", config)


def test_gradients_of_the_image_agree_with_differences() -> None:
    """The generator's gradient: through normalization, resampling, attention and preconditioning."""
    for architecture in ("edm:ncsnpp", "edm:adm", "edm2:tiny"):
        network = randomized(architecture, WIDE | {"img_resolution": 4, "attn_resolutions": [2]}).double()
        x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        sigma = torch.tensor([0.7], dtype=torch.float64)
        direction = torch.randn_like(x)
        (slope,) = torch.autograd.grad(network(x, sigma, torch.tensor([1])).sum(), x)
        with torch.no_grad():
            step = 1e-5 * direction
            labels = torch.tensor([1])
            rise = network(x + step, sigma, labels).sum() - network(x - step, sigma, labels).sum()
        assert float((slope * direction).sum()) == pytest.approx(float(rise) / 2e-5, rel=1e-5)
