"""Networks of the published families, small or from the fixtures, for several test files."""

from __future__ import annotations

from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffratio_fast import networks
from diffratio_fast.networks import unet
from support import TESTS

FIXTURES = TESTS / "fixtures" / "backbones"
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
    """Root mean square of the difference over that of the expected values."""
    return float((out.double() - right.double()).norm() / right.double().norm())


def randomized(architecture: str, config: dict[str, Any]) -> unet.Denoiser:
    """A network without zero-initialized layers, in eval mode."""
    network = networks.from_published(architecture, config)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.abs().max() < 1e-2:
                parameter.normal_(std=0.5 if parameter.ndim == 0 else 0.05)
    return network.eval()
