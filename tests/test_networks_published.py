"""The EDM and EDM2 networks: published outputs, names, shapes and counts; precision, labels, halves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from diffratio_fast import networks
from diffratio_fast.command import UserError
from diffratio_fast.networks import edm2, unet
from diffratio_fast.networks.published import with_state

FIXTURES = Path(__file__).parent / "fixtures" / "backbones"
TINY = ["edm_ddpmpp_tiny", "edm_ncsnpp_tiny", "edm_adm_tiny", "edm2_tiny"]
SONG: dict[str, Any] = {
    "img_resolution": 16, "img_channels": 2, "label_dim": 3, "model_channels": 16, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [8], "dropout": 0.0,
}  # fmt: skip
WIDE: dict[str, Any] = SONG | {"model_channels": 64}  # two heads at 8x8 in ADM and EDM2


def metadata(name: str) -> dict[str, str]:
    from safetensors import safe_open

    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        return file.metadata()


def tiny(name: str) -> tuple[unet.Denoiser, dict[str, Tensor]]:
    """The fixture's network in eval mode, and its inputs and output by their last names."""
    tensors = load_file(FIXTURES / f"{name}.safetensors")
    about = metadata(name)
    network = networks.from_published(about["architecture"], about["config"])
    state = {key.removeprefix("state."): value for key, value in tensors.items() if key.startswith("state.")}
    network.load_state_dict(state, strict=True)
    rest = {key.partition(".")[2]: value for key, value in tensors.items() if not key.startswith("state.")}
    return network.eval(), rest


def error(out: Tensor, right: Tensor) -> float:
    """Root mean square of the difference over that of what is right."""
    return float((out.double() - right.double()).norm() / right.double().norm())


def randomised(architecture: str, config: dict[str, Any]) -> unet.Denoiser:
    """A network none of whose layers starts at zero, in eval mode."""
    network = networks.from_published(architecture, config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-2:
                parameter.normal_(std=0.5 if parameter.ndim == 0 else 0.05)
    return network.eval()


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_published_outputs(name: str) -> None:
    network, data = tiny(name)
    out = network(data["x"], data["sigma"], data.get("labels"))
    assert out.dtype == torch.float32
    for one, right in zip(out, data["denoised"], strict=True):  # one noise level each
        assert error(one, right) < 3e-6


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_channels_last_and_a_configuration_as_a_mapping_give_the_same(name: str) -> None:
    network, data = tiny(name)
    about = metadata(name)
    again = networks.from_published(about["architecture"], json.loads(about["config"]))
    again.load_state_dict(network.state_dict(), strict=True)
    again.eval().to(memory_format=torch.channels_last)
    x = data["x"].contiguous(memory_format=torch.channels_last)
    assert error(again(x, data["sigma"], data.get("labels")), data["denoised"]) < 3e-6


@pytest.mark.parametrize("cast", ["autocast", "weights"])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_bfloat16_is_right_to_rounding(name: str, cast: str) -> None:
    network, data = tiny(name)
    if cast == "weights":
        network.bfloat16()
        assert all(
            buffer.dtype == torch.float32 for key, buffer in network.named_buffers() if "fourier" in key
        )
    with torch.autocast("cpu", torch.bfloat16, enabled=cast == "autocast"):
        out = network(data["x"], data["sigma"], data.get("labels"))
    assert out.dtype == torch.float32
    assert 1e-4 < error(out, data["denoised"]) < 5 * 2**-8  # bfloat16 has eight bits; and it was used


@torch.no_grad()
def test_frequencies_survive_a_cast_to_bfloat16() -> None:
    network, _ = tiny("edm_ncsnpp_tiny")
    before = network.model.map_noise.freqs.clone()
    network.bfloat16().float()
    assert torch.equal(network.model.map_noise.freqs, before)
    assert not torch.equal(
        network.model.map_layer0.weight, tiny("edm_ncsnpp_tiny")[0].model.map_layer0.weight
    )


@torch.no_grad()
def test_float64_is_computed_in_float64() -> None:
    network, data = tiny("edm2_tiny")
    network.double()
    out = network(data["x"].double(), data["sigma"].double(), data["labels"])
    assert out.dtype == torch.float64 and error(out, data["denoised"]) < 1e-6
    assert not torch.equal(out, out.float().double())


FULL = {
    "ddpmpp_cifar10": ("edm:ddpmpp", {"img_resolution": 32, "img_channels": 3, "label_dim": 10,
                                      "augment_dim": 9, "model_channels": 128, "channel_mult": [2, 2, 2]}),
    "adm_imagenet64": ("edm:adm", {"img_resolution": 64, "img_channels": 3, "label_dim": 1000,
                                   "model_channels": 192, "channel_mult": [1, 2, 3, 4]}),
    "edm2_xs_imagenet512": ("edm2:xs", {"img_resolution": 64, "img_channels": 4, "label_dim": 1000}),
}  # fmt: skip


def on_meta(architecture: str, config: dict[str, Any]) -> unet.Denoiser:
    with torch.device("meta"):
        return networks.from_published(architecture, config)


@pytest.mark.parametrize("name", FULL)
def test_names_and_shapes_of_the_full_size_networks(name: str) -> None:
    published = (FIXTURES / f"{name}.txt").read_text().splitlines()
    state = on_meta(*FULL[name]).state_dict()
    assert [f"{key} {'x'.join(map(str, value.shape))}".strip() for key, value in state.items()] == published


@pytest.mark.parametrize(
    ("architecture", "config", "count"),
    [
        ("edm:ddpmpp", FULL["ddpmpp_cifar10"][1], 55_735_299),
        ("edm:ddpmpp", FULL["ddpmpp_cifar10"][1] | {"label_dim": 0}, 55_733_891),
        ("edm:adm", FULL["adm_imagenet64"][1], 295_899_267),
        ("edm2:xxs", FULL["edm2_xs_imagenet512"][1], 31_309_029),
        ("edm2:xs", FULL["edm2_xs_imagenet512"][1], 124_713_253),
        ("edm2:s", FULL["edm2_xs_imagenet512"][1], 280_212_837),
        ("edm2:m", FULL["edm2_xs_imagenet512"][1], 497_807_781),
        ("edm2:l", FULL["edm2_xs_imagenet512"][1], 777_498_085),
        ("edm2:xl", FULL["edm2_xs_imagenet512"][1], 1_119_283_749),
        ("edm2:xxl", FULL["edm2_xs_imagenet512"][1], 1_523_164_773),
    ],
)
def test_parameter_counts(architecture: str, config: dict[str, Any], count: int) -> None:
    assert sum(parameter.numel() for parameter in on_meta(architecture, config).parameters()) == count


# Other members of the families.


@pytest.mark.parametrize(
    ("architecture", "change"),
    [
        ("edm:ddpmpp", {"label_dim": 0}),
        ("edm:ddpmpp", {"img_resolution": 28, "channel_mult": [1, 2, 2], "attn_resolutions": [7, 28]}),
        ("edm:ddpmpp", {"encoder_type": "skip", "decoder_type": "skip", "channel_mult": [1, 1, 2]}),
        ("edm:ncsnpp", {"channel_mult": [1, 2, 3], "channel_mult_emb": 2, "augment_dim": 4}),
        ("edm:ncsnpp", {"encoder_type": "residual", "decoder_type": "skip", "resample_filter": [1, 2, 2, 1]}),
        ("edm:adm", {"model_channels": 64, "augment_dim": 4, "label_dim": 0, "img_channels": 1}),
        ("edm:adm", {"model_channels": 24, "channel_mult": [2, 1], "channel_mult_emb": 1}),
        ("edm2:tiny", {"model_channels": 64, "attn_resolutions": [16, 8], "label_dim": 0}),
        (
            "edm2:tiny",
            {"channels_per_head": 8, "channel_mult_noise": 2, "channel_mult_emb": 3, "num_blocks": 2},
        ),
        ("edm2:tiny", {"resample_filter": [1, 3, 3, 1], "clip_act": None, "logvar_channels": 8}),
    ],
)
def test_every_option_builds_a_network_that_learns_everywhere(
    architecture: str, change: dict[str, Any]
) -> None:
    config = SONG | change
    network = randomised(architecture, config)
    size = config["img_resolution"]
    x = torch.randn(2, config["img_channels"], size, size)
    augment = torch.randn(2, config["augment_dim"]) if config.get("augment_dim") else None
    out = network(x, torch.tensor([0.3, 2.0]), torch.tensor([0, 1]), augment)
    assert out.shape == x.shape and out.isfinite().all()
    out.square().sum().backward()
    silent = [
        name
        for name, parameter in network.named_parameters()
        if (parameter.grad is None or not parameter.grad.any()) and "logvar" not in name
    ]
    assert not silent


@torch.no_grad()
def test_skip_types_carry_an_image_pyramid() -> None:
    """With every residual block's output cut, what is left of the skip decoder is the sum of its pyramid."""
    network = randomised("edm:ddpmpp", SONG | {"decoder_type": "skip", "encoder_type": "skip"})
    names = network.state_dict()
    assert "model.enc.8x8_aux_down.resample_filter" in names and "model.enc.8x8_aux_down.weight" not in names
    assert names["model.enc.8x8_aux_skip.weight"].shape == (16, 2, 1, 1)
    assert "model.dec.8x8_aux_conv.weight" in names and "model.dec.8x8_aux_up.weight" not in names
    backbone = network.backbone
    for key in ("8x8_aux_conv", "16x16_aux_conv"):
        layer = backbone.dec[key]
        layer.weight.zero_()
        layer.bias.copy_(torch.tensor([1.0, 2.0]) if key.startswith("8x8") else torch.tensor([10.0, 20.0]))
    out = backbone(torch.randn(1, 2, 16, 16), torch.zeros(1), torch.zeros(1, 3))
    assert torch.allclose(out, torch.tensor([11.0, 22.0])[:, None, None].expand(1, 2, 16, 16))


# The traps.


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
def test_forced_normalisation_in_training_mode_only() -> None:
    network, data = tiny("edm2_tiny")
    layers = [module for module in network.modules() if isinstance(module, edm2.MPConv)]
    before = [layer.weight.clone() for layer in layers]
    out = network(data["x"], data["sigma"], data["labels"])
    assert all(torch.equal(layer.weight, weight) for layer, weight in zip(layers, before, strict=True))
    network.train()
    trained = network(data["x"], data["sigma"], data["labels"])
    assert error(trained, out) < 1e-4  # the same function: normalising twice is normalising once, to eps
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
        with pytest.raises(ValueError, match="is not among the classes"):
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
        network = randomised(architecture, SONG | change)
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
        ("edm:unet", {}, "the variants are ddpmpp, ncsnpp, adm"),
        ("edm2:huge", {"model_channels": ...}, "the variants are xxs, xs, s"),
        ("edm:adm", {"resample_filter": [1, 1]}, "unknown option 'resample_filter'"),
        ("edm2:xs", {"depth": 3}, "unknown option 'depth'"),
        ("edm2:xs", {"unet_kwargs": {}}, "unknown option 'unet_kwargs'"),
        ("edm:adm", {"model_type": "SongUNet"}, "contradicts"),
        ("edm:x", {"model_type": "UViT"}, "model_type must be one of"),
        ("edm:ddpmpp", {"encoder_type": "dense"}, "encoder_type must be one of standard, skip, residual"),
        ("edm:ddpmpp", {"img_channels": ...}, "lacks 'img_channels'"),
        ("edm:ddpmpp", {"channel_mult": [1, 1.5]}, "channel_mult must be a list of whole numbers"),
        ("edm:ddpmpp", {"channel_mult": []}, "channel_mult"),
        ("edm:ddpmpp", {"dropout": 2}, "dropout must be a number from 0 to 1"),
        ("edm:ddpmpp", {"model_channels": "16"}, "model_channels must be a whole number"),
        ("edm:ddpmpp", {"num_blocks": True}, "num_blocks must be a whole number"),
        ("edm:ddpmpp", {"img_resolution": 15}, "img_resolution 15 cannot be halved 1 times"),
        ("edm:ddpmpp", {"resample_filter": [1, 2, 1]}, "even number of taps"),
        ("edm2:x", {"resample_filter": [1, 2, 1]}, "even number of taps"),
        ("edm:ddpmpp", {"model_channels": 2}, "groups of four"),
        ("edm:adm", {"sigma_data": 0}, "sigma_data must be a number above 0"),
        ("edm2:x", {"model_channels": 200, "attn_resolutions": [16]}, "200 channels cannot be shared by 3"),
    ],
)
def test_what_cannot_be_built_is_said(architecture: str, change: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in (SONG | change).items() if value is not ...}
    with pytest.raises(ValueError, match="(?s)" + message.replace("[", r"\[")):
        networks.from_published(architecture, config)


@pytest.mark.parametrize("config", ["{", "[]", "3", 7])
def test_a_configuration_that_is_none(config: Any) -> None:
    with pytest.raises(ValueError, match="configuration"):
        networks.from_published("edm2:xs", config)


def test_gradients_of_the_image_agree_with_differences() -> None:
    """What a generator is trained by: through normalisation, resampling, attention and preconditioning."""
    for architecture in ("edm:ncsnpp", "edm:adm", "edm2:tiny"):
        network = randomised(architecture, WIDE | {"img_resolution": 4, "attn_resolutions": [2]}).double()
        x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)
        sigma = torch.tensor([0.7], dtype=torch.float64)
        direction = torch.randn_like(x)
        (slope,) = torch.autograd.grad(network(x, sigma, torch.tensor([1])).sum(), x)
        with torch.no_grad():
            step = 1e-5 * direction
            labels = torch.tensor([1])
            rise = network(x + step, sigma, labels).sum() - network(x - step, sigma, labels).sum()
        assert float((slope * direction).sum()) == pytest.approx(float(rise) / 2e-5, rel=1e-5)


# The encoder half.


@pytest.mark.parametrize("keep_middle", [True, False])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_the_encoder_half_stands_alone(name: str, keep_middle: bool) -> None:
    network, data = tiny(name)
    arguments = (data["x"], data["sigma"], data.get("labels"))
    whole = network.encode(*arguments, middle=keep_middle)
    assert len(whole.maps) == sum("aux" not in key for key in network.backbone.enc) + keep_middle
    assert whole.maps[-1].shape == (3, 32 if "adm" not in name else 64, 8, 8) and len(whole.embedding) == 3
    if keep_middle:
        features = whole.maps[:-1]
        out = network.backbone.decode(whole.maps[-1], features, whole.embedding)
        v = (data["sigma"] ** 2 + 0.25).reshape(-1, 1, 1, 1)
        c_out = data["sigma"].reshape(-1, 1, 1, 1) * 0.5 / v.sqrt()
        assert error(0.25 / v * data["x"] + c_out * out, data["denoised"]) < 3e-6
    parameters = sum(p.numel() for p in network.parameters())
    network.backbone.remove_decoder(keep_middle=keep_middle)
    assert sum(p.numel() for p in network.parameters()) < 0.75 * parameters
    half = network.encode(*arguments, middle=keep_middle)
    assert all(torch.equal(a, b) for a, b in zip(half.maps, whole.maps, strict=True))
    assert [key for key in network.backbone.dec if "_in" not in key] == []
    assert len(network.backbone.dec) == (2 if keep_middle else 0)


# Files.


@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_load_published(name: str, tmp_path: Path) -> None:
    network, data = tiny(name)
    about = metadata(name)
    path = tmp_path / "network.safetensors"
    save_file({key: value.half() for key, value in network.state_dict().items()}, path, about)
    loaded, metadata_read = networks.load_published(path)
    assert metadata_read == about and not loaded.training
    assert loaded.architecture == about["architecture"] and loaded.config == json.loads(about["config"])
    assert all(tensor.dtype == torch.float32 for tensor in loaded.state_dict().values())
    assert 0 < error(loaded(data["x"], data["sigma"], data.get("labels")), data["denoised"]) < 3e-3
    fixture, _ = networks.load_published(str(FIXTURES / f"{name}.safetensors"))
    assert error(fixture(data["x"], data["sigma"], data.get("labels")), data["denoised"]) < 3e-6


def test_files_that_cannot_be_loaded(tmp_path: Path) -> None:
    path = tmp_path / "network.safetensors"
    with pytest.raises(UserError, match="no such file"):
        networks.load_published(path)
    path.write_bytes((FIXTURES / "edm2_tiny.safetensors").read_bytes()[:-7])
    with pytest.raises(UserError, match="damaged or not a safetensors file"):
        networks.load_published(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"lacks 'architecture'.*diffratio_fast\.convert"):
        networks.load_published(path)
    save_file({"a": torch.zeros(1)}, path, metadata("edm2_tiny"))
    with pytest.raises(UserError, match=r"weights do not fit edm2:a: Missing key"):
        networks.load_published(path)
    save_file({"a": torch.zeros(1)}, path, {"architecture": "edm3:a", "config": "{}"})
    with pytest.raises(UserError, match=r"network\.safetensors: unknown architecture"):
        networks.load_published(path)


def test_weights_of_another_shape_are_named() -> None:
    network, _ = tiny("edm2_tiny")
    state = network.state_dict() | {"unet.out_conv.weight": torch.zeros(4, 16, 1, 1)}
    with pytest.raises(ValueError, match=r"size mismatch for unet\.out_conv\.weight"):
        with_state("edm2:a", network.config, state)
