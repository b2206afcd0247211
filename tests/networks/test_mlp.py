"""The dense ratio network: its heads, and files from before the heads existed."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from diffratio_fast import networks
from diffratio_fast.networks.mlp import MLPRatio
from diffratio_fast.networks.saved import SavedNetwork

SHAPE, CLASSES = (2, 3, 3), 4


def ratio(**options: object) -> MLPRatio:
    arguments = {"shape": SHAPE, "classes": CLASSES, "width": 16, "depth": 2} | options
    network = networks.build("ratio", "mlp", arguments)
    networks.initialize(network, 0, stream=1)
    assert isinstance(network, MLPRatio)
    return network.double()


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.randn(5, *SHAPE).double(), torch.rand(5).double() + 0.1, torch.arange(5) % CLASSES


@pytest.mark.parametrize("head", ["scalar", "energy"])
def test_the_log_ratio_starts_at_zero(head: str) -> None:
    assert torch.equal(ratio(head=head)(*inputs()), torch.zeros(5).double())


def test_the_energy_head_is_a_scalar_and_an_inner_product() -> None:
    plain, energy = ratio(), ratio(head="energy")
    x, sigma, labels = inputs()
    weight = torch.randn(19, 16).double()
    force = torch.randn(18).double()
    with torch.no_grad():
        plain.last.weight.copy_(weight[:1])
        energy.last.weight.zero_()[:1] = weight[:1]
        torch.testing.assert_close(energy(x, sigma, labels), plain(x, sigma, labels))
        energy.last.bias[1:] = force  # an F that is the same for all images
        expected = x.flatten(1) @ force / (sigma**2 + 0.25).sqrt() / 18**0.5
        torch.testing.assert_close(energy(x, sigma, labels), plain(x, sigma, labels) + expected)
        scaled = ratio(head="energy", scaled=True)
        scaled.load_state_dict(energy.state_dict())
        factor = 0.5 / (sigma**2 + 0.25).sqrt()
        torch.testing.assert_close(scaled(x, sigma, labels), energy(x, sigma, labels) * factor)


def test_another_head_is_refused() -> None:
    with pytest.raises(ValueError, match="head must be one of scalar, energy, not vector"):
        ratio(head="vector")


def test_files_of_the_first_format_load_as_they_were(tmp_path: Path) -> None:
    network, path = ratio().float(), tmp_path / "ratio.safetensors"
    with torch.no_grad():
        network.last.weight.normal_()
    arguments = {"shape": SHAPE, "classes": CLASSES, "width": 16, "depth": 2}
    networks.save(path, network, SavedNetwork("ratio", "mlp", arguments, {}, {}))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "diffratio_fast.network.2"
    first = metadata | {"format": "diffratio_fast.network.1"}
    safetensors.torch.save_file(network.state_dict(), path, first)
    loaded, _ = networks.load(path, "ratio")
    x, sigma, labels = inputs()
    with torch.no_grad():
        assert torch.equal(
            loaded(x.float(), sigma.float(), labels), network(x.float(), sigma.float(), labels)
        )
