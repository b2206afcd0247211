"""Generators and ratio networks from the published U-Nets: initialization, copied weights, dropout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from diffratio_fast import networks, ops
from diffratio_fast.data.dataset import InMemoryDataSet
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.errors import UserError
from diffratio_fast.networks import edm2
from diffratio_fast.networks.backbone import BackboneGenerator, EncoderRatio, set_checkpointing, set_dropout
from diffratio_fast.networks.layers import Dropout, dropout_stream
from diffratio_fast.training.state.initial import load_initial

SHAPE, CLASSES = (2, 16, 16), 3
OPTIONS: dict[str, Any] = {
    "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]
}  # fmt: skip
BACKBONES = {
    "edm:ddpmpp": OPTIONS,
    "edm:adm": OPTIONS | {"model_channels": 64},
    "edm2:xs": OPTIONS | {"model_channels": 64},
}
EVERY = pytest.mark.parametrize("backbone", BACKBONES)


def ratio(backbone: str, **options: Any) -> EncoderRatio:
    network = networks.build(
        "ratio", "encoder",
        {"shape": SHAPE, "classes": CLASSES, "backbone": backbone, "options": BACKBONES[backbone]} | options,
    )  # fmt: skip
    networks.initialize(network, 0, stream=1)
    assert isinstance(network, EncoderRatio)
    return network


def generator(backbone: str, **options: Any) -> BackboneGenerator:
    arguments = {
        "shape": SHAPE, "classes": CLASSES, "backbone": backbone, "options": BACKBONES[backbone],
        "sigma_init": 2.5,
    }  # fmt: skip
    network = networks.build("generator", "backbone", arguments | options)
    networks.initialize(network, 0, stream=0)
    assert isinstance(network, BackboneGenerator)
    return network


def inputs(count: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(count, *SHAPE), torch.rand(count) + 0.1, torch.arange(count) % CLASSES


def awake(network: torch.nn.Module) -> torch.nn.Module:
    """Make every parameter nonzero, so that each one affects the output."""
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-2:
                parameter.normal_(std=0.3 if parameter.ndim == 0 else 0.05)
    return network


@EVERY
@pytest.mark.parametrize("pool", ["linear", "attention"])
@pytest.mark.parametrize("middle", [True, False])
def test_a_ratio_network_starts_at_zero_and_can_leave_it(backbone: str, pool: str, middle: bool) -> None:
    network = ratio(backbone, pool=pool, middle=middle).train()
    x, sigma, labels = inputs()
    out = network(x, sigma, labels)
    assert out.shape == (4,) and torch.equal(out, torch.zeros(4))
    rate = 1e-2 if backbone == "edm2:xs" else 5e-4  # at first the head's gains train, or all its weights
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    target = torch.tensor([1.0, -1.0, 1.0, -1.0])
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = (network(x, sigma, labels) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert min(losses) < 0.5 * losses[0]
    silent = [name for name, p in network.named_parameters() if p.grad is None]
    assert silent == []  # every parameter has an effect
    assert any(
        name.endswith("_in0.conv0.weight") or "_in0.conv_res0" in name for name in network.state_dict()
    ) == (middle)


@EVERY
def test_an_energy_head_adds_the_inner_product_of_image_and_features(backbone: str) -> None:
    """Against F enlarged by repeating pixels; at the start the head is zero, and so is the log ratio."""
    network = ratio(backbone, head="energy").train()
    x, sigma, labels = inputs()
    assert torch.equal(network(x, sigma, labels), torch.zeros(4))
    network = awake(network).double().eval()
    x, sigma = x.double(), sigma.double()
    with torch.no_grad():
        found = network(x, sigma, labels)
        maps, embedding = network.denoiser.encode(x, sigma, labels, middle=True)
        images = x / (sigma**2 + 0.25).sqrt().reshape(-1, 1, 1, 1)
        force = torch.zeros_like(images)
        for read, side in zip(network.energy.read, sorted({h.shape[-1] for h in maps})[::-1], strict=True):
            h = [h for h in maps if h.shape[-1] == side][-1]
            h = torch.nn.functional.silu(h / (h.square().mean((1, 2, 3), keepdim=True) + 1e-6).sqrt())
            small = torch.einsum("nchw,oc->nohw", h, read.weight) + read.bias.reshape(-1, 1, 1)
            factor = images.shape[-1] // side
            force += small.repeat_interleave(factor, 2).repeat_interleave(factor, 3) / factor
        energy = (images * force).flatten(1).sum(1) / images[0].numel() ** 0.5
        torch.testing.assert_close(found, network.head(maps[-1], embedding) + energy)
        assert float(energy.abs().min()) > 1e-3
    scaled = awake(ratio(backbone, head="energy", scaled=True)).double().eval()
    scaled.load_state_dict(network.state_dict())
    torch.testing.assert_close(scaled(x, sigma, labels), found * 0.5 / (sigma**2 + 0.25).sqrt())


@EVERY
def test_the_ratio_network_depends_on_position_class_and_noise_level(backbone: str) -> None:
    network = awake(ratio(backbone)).eval()
    x, sigma, labels = inputs()
    with torch.no_grad():
        out = network(x, sigma, labels)
        for other in (network(x.roll(8, 3), sigma, labels), network(x, 2 * sigma, labels),
                      network(x, sigma, (labels + 1) % CLASSES)):  # fmt: skip
            assert (other - out).abs().min() > 1e-5


@EVERY
def test_a_generator_is_its_denoiser_at_one_noise_level(backbone: str) -> None:
    network = awake(generator(backbone, bounds=([-0.1, -0.1], [0.1, 0.05]))).eval()
    z, _, labels = inputs()
    with torch.no_grad():
        right = network.denoiser(2.5 * z, torch.tensor(2.5), labels)
        out = network(z, labels)
    assert torch.equal(out[:, 0], right[:, 0].clamp(-0.1, 0.1))
    assert torch.equal(out[:, 1], right[:, 1].clamp(-0.1, 0.05))
    assert out.max() <= 0.1 < right.max()


@EVERY
def test_weights_come_from_the_seed_alone(backbone: str) -> None:
    torch.manual_seed(1)
    first = generator(backbone)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    second = generator(backbone)
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    torch.random.set_rng_state(state)
    networks.initialize(second, 1, stream=0)
    changed = [not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True)]
    assert sum(changed) > len(changed) / 4
    # the published laws: the spread of a layer's weights
    layer = first.denoiser.backbone.enc["16x16_block0"]
    weight = layer.conv0.weight if hasattr(layer, "conv0") else layer.conv_res0.weight
    fan = weight[0].numel(), weight.shape[0] * 9
    right = {"edm:ddpmpp": 2 / sum(fan), "edm:adm": 1 / (3 * fan[0]), "edm2:xs": 1.0}[backbone]
    assert float(weight.square().mean()) == pytest.approx(right, rel=0.05)


@EVERY
@pytest.mark.parametrize("network", ["generator", "ratio"])
def test_no_class_needs_no_label(backbone: str, network: str) -> None:
    if network == "generator":
        one = generator(backbone, classes=1)
        assert one(torch.randn(2, *SHAPE), torch.zeros(2, dtype=torch.int64)).shape == (2, *SHAPE)
    else:
        two = awake(ratio(backbone, classes=1)).eval()
        assert two(*inputs(2)).isfinite().all()


@EVERY
def test_dropout_is_a_function_of_seed_step_and_sample(backbone: str) -> None:
    network = awake(ratio(backbone, dropout=0.4)).train()
    x, sigma, labels = inputs(6)
    index = torch.arange(6)

    def out(step: int, chosen: slice = slice(None), substep: int = 0) -> torch.Tensor:
        with torch.no_grad(), dropout_stream(network, ops.make_rng(3, step), index[chosen], substep=substep):
            return network(x[chosen], sigma[chosen], labels[chosen])

    out(0)  # stores EDM2's weights normalized
    torch.manual_seed(1)
    first = out(5)
    torch.manual_seed(2)
    assert torch.allclose(out(5), first, rtol=1e-4)
    assert torch.allclose(out(5, slice(2, 4)), first[2:4], rtol=1e-3, atol=1e-5)  # rounding only
    assert not torch.allclose(out(6), first, rtol=1e-2) and not torch.allclose(
        out(5, substep=1), first, rtol=1e-2
    )
    network.eval()
    assert torch.equal(out(5), out(6))


def test_dropout_keeps_its_share_and_the_mean() -> None:
    layer = Dropout(0.3).train()
    x = torch.ones(8, 5, 37, 41)
    with dropout_stream(layer, ops.make_rng(0, 0), torch.arange(8)):
        y = layer(x)
    kept = (y != 0).double().flatten(1).mean(1)
    assert torch.allclose(kept, torch.full_like(kept, 0.7), atol=4 * (0.21 / 7585) ** 0.5)
    assert float(y.max()) == pytest.approx(1 / 0.7)
    assert not torch.equal(y[0], y[1])
    assert layer.stream is None


@EVERY
def test_checkpointing_changes_memory_not_gradients(backbone: str) -> None:
    network = awake(ratio(backbone, dropout=0.3)).train()
    x, sigma, labels = inputs()

    def gradients(on: bool) -> list[torch.Tensor]:
        set_checkpointing(network, on)
        network.zero_grad()
        with dropout_stream(network, ops.make_rng(0, 1), torch.arange(4)):
            network(x, sigma, labels).square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    gradients(False)  # stores EDM2's weights normalized
    for a, b in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def compiled(network: torch.nn.Module) -> Any:
    return torch.compile(network, backend="aot_eager_decomp_partition")


@pytest.mark.slow
def test_compiled_training_stores_the_weights_that_eager_training_stores() -> None:
    config = OPTIONS | {"img_resolution": 16, "img_channels": 2, "label_dim": 3, "num_blocks": 1}
    x, sigma, labels = inputs()
    stored = []
    for wrap in (lambda network: network, compiled):
        network = networks.from_published("edm2:xs", config | {"model_channels": 16}).train()
        networks.initialize(network, 0, stream=0)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.mul_(0.3)  # far from normalized: normalizing twice would differ
            network.unet.out_gain.fill_(1)
        wrap(network)(x, sigma, labels).square().mean().backward()
        stored.append([m.weight.detach().clone() for m in network.modules() if isinstance(m, edm2.MPConv)])
    assert all(torch.equal(a, b) for a, b in zip(*stored, strict=True))


SCALED = Scaling((127.5,), (63.75,), 0.0, 255.0)


def dataset(scaling: Scaling = SCALED, size: int = 16) -> InMemoryDataSet:
    records = torch.zeros(4, 2, size, size, dtype=torch.uint8)
    splits = {split: (records, torch.arange(4) % 3) for split in ("train", "validation", "test")}
    return InMemoryDataSet("tiny", ("a", "b", "c"), scaling, splits)


def converted(path: Path, backbone: str, **options: Any) -> Path:
    """A file as ``convert`` writes it, of a network without zero weights."""
    config = BACKBONES[backbone] | {"img_resolution": 16, "img_channels": 2, "label_dim": 3} | options
    network = awake(networks.from_published(backbone, config))
    file = path / "published.safetensors"
    save_file(
        {name: tensor.contiguous() for name, tensor in network.state_dict().items()}, file,
        {"architecture": backbone, "config": json.dumps(config)},
    )  # fmt: skip
    return file


@EVERY
def test_published_weights_give_generator_and_encoder(backbone: str, tmp_path: Path) -> None:
    augmented = {"augment_dim": 9} if backbone != "edm2:xs" else {}
    file = converted(tmp_path, backbone, dropout=0.1, **augmented)
    published, _ = networks.load_published(file)
    one, two = generator(backbone), ratio(backbone, dropout=0.2)
    load_initial(file, one, two, dataset())
    z, sigma, labels = inputs()
    one.eval()
    with torch.no_grad():
        assert torch.equal(one(z, labels), published(2.5 * z, torch.tensor(2.5), labels))
        maps, _ = published.encode(z, sigma, labels, middle=True)
        theirs, _ = two.eval().denoiser.encode(z, sigma, labels, middle=True)
        assert torch.equal(maps[-1], theirs[-1])
        assert torch.equal(two(z, sigma, labels), torch.zeros(4))


@pytest.mark.parametrize(
    ("change", "data", "expected"),
    [
        ({"model_channels": 32}, dataset(), '--backbone-options \'{"model_channels": 32'),
        (
            {"resample_filter": [1, 3, 3, 1]},
            dataset(),
            "resample_filter is [1, 3, 3, 1]; this run needs [1, 1]",
        ),
        ({"label_dim": 4}, dataset(), "and 4 classes"),
        ({}, dataset(Scaling((10.0,), (5.0,), 0.0, 255.0)), "prepare it with the same --scaling"),
    ],
)
def test_published_weights_that_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], data: InMemoryDataSet, expected: str
) -> None:
    file = converted(tmp_path, "edm:ddpmpp", **change)
    with pytest.raises(UserError) as error:
        load_initial(file, generator("edm:ddpmpp"), ratio("edm:ddpmpp"), data)
    assert expected in str(error.value) and "\n" not in str(error.value)


def test_bad_backbones_raise() -> None:
    with pytest.raises(ValueError, match="follows from the data"):
        generator("edm:ddpmpp", options={"label_dim": 3})
    with pytest.raises(ValueError, match="square images"):
        generator("edm:ddpmpp", shape=(1, 8, 16))
    with pytest.raises(ValueError, match="unknown option"):
        ratio("edm:ddpmpp", options={"depth": 3})
    with pytest.raises(ValueError, match="pool must be"):
        ratio("edm:ddpmpp", pool="max")


def test_a_generator_has_no_dropout_and_a_ratio_network_its_own() -> None:
    options = OPTIONS | {"dropout": 0.5}
    probabilities = {
        role: {module.probability for module in network.modules() if isinstance(module, Dropout)} - {0.0}
        for role, network in {
            "generator": generator("edm:ddpmpp", options=options),
            "ratio": ratio("edm:ddpmpp", options=options, dropout=0.2),
        }.items()
    }
    assert probabilities == {"generator": set(), "ratio": {0.2}}
    set_dropout(network := ratio("edm:adm"), 0.1)
    assert {m.probability for m in network.modules() if isinstance(m, Dropout)} == {0.1}
