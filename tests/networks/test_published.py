"""The EDM and EDM2 networks: published outputs, names, shapes and counts; precision, labels, halves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support.published_networks import FIXTURES, SONG, TINY, error, metadata, randomized, tiny

from diffratio_fast import networks
from diffratio_fast.errors import UserError
from diffratio_fast.networks import unet
from diffratio_fast.networks.published import with_state


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
    assert 1e-4 < error(out, data["denoised"]) < 5 * 2**-8  # bfloat16 has eight bits; it was used


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
    network = randomized(architecture, config)
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
    """With every residual block's output cut, the output of the skip decoder is the sum of its pyramid."""
    network = randomized("edm:ddpmpp", SONG | {"decoder_type": "skip", "encoder_type": "skip"})
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
    with pytest.raises(UserError, match=r"no 'architecture' in its metadata.*diffratio_fast\.convert"):
        networks.load_published(path)
    save_file({"a": torch.zeros(1)}, path, metadata("edm2_tiny"))
    with pytest.raises(UserError, match=r"weights do not match edm2:a: Missing key"):
        networks.load_published(path)
    save_file({"a": torch.zeros(1)}, path, {"architecture": "edm3:a", "config": "{}"})
    with pytest.raises(UserError, match=r"network\.safetensors: unknown architecture"):
        networks.load_published(path)


def test_weights_of_another_shape_are_named() -> None:
    network, _ = tiny("edm2_tiny")
    state = network.state_dict() | {"unet.out_conv.weight": torch.zeros(4, 16, 1, 1)}
    with pytest.raises(ValueError, match=r"size mismatch for unet\.out_conv\.weight"):
        with_state("edm2:a", network.config, state)
