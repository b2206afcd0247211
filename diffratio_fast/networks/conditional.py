"""A denoiser of real and generated images at once, which returns the difference of the two denoisers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffratio_fast.networks.backbone import build_denoiser, drop_uncertainty, set_dropout
from diffratio_fast.networks.edm import DhariwalUNet, SongUNet
from diffratio_fast.networks.edm_layers import Conv2d, Initial
from diffratio_fast.networks.layers import Linear
from diffratio_fast.networks.mlp import DenseNet
from diffratio_fast.networks.unet import Denoiser, at_least_float32


class ConditionalDenoiser(nn.Module):
    """D(x; sigma, c, y) = m + (y - 1/2) tau: denoiser of real (y = 1) and of generated (y = 0) images.

    ``forward`` takes what a ``Denoiser`` does and returns (m, tau), images like the noised ones [N, C, R, R];
    m has EDM's preconditioning, tau its c_out. By Tweedie's formula tau / sigma^2 is the gradient of the log
    ratio. Both are read from one network, tau by a separate read-out that starts at zero. ``gain``
    multiplies tau: with Adam it is the factor between tau's learning rate and the other weights'.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        backbone: str,
        options: Mapping[str, Any],
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.gain = gain
        self.denoiser = build_denoiser(shape, classes, backbone, options)
        drop_uncertainty(self.denoiser)
        set_dropout(self.denoiser, 0.0)
        add_read_out(self.denoiser)

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        out, c_skip, c_out = self.denoiser.read(noised, sigma, labels)
        image, difference = at_least_float32(out).chunk(2, 1)
        return c_skip * noised + c_out * image, self.gain * c_out * difference


class ReadOut(nn.Module):
    """A network's read-out and a second one: their results, concatenated along the channels."""

    def __init__(self, image: nn.Module, difference: nn.Module) -> None:
        super().__init__()
        self.image, self.difference = image, difference

    def forward(self, h: Tensor) -> Tensor:
        return torch.cat((self.image(h), self.difference(h)), 1)


def add_read_out(denoiser: Denoiser) -> None:
    """Give a denoiser's network a second read-out that starts at zero, in place.

    Raises ``ValueError`` for a network without a single linear read-out.
    """
    network = cast(nn.Module, denoiser.backbone)
    if isinstance(network, DenseNet):
        network.last = ReadOut(
            network.last, Linear(network.last.in_features, network.last.out_features, gain=0.0)
        )  # type: ignore[assignment]
        return
    owner: Any
    if isinstance(network, DhariwalUNet):
        owner, name = network, "out_conv"
    elif isinstance(network, SongUNet):
        owner, names = network.dec, [name for name in network.dec if name.endswith("aux_conv")]
        if len(names) > 1:
            raise ValueError("with decoder_type skip an image is read at every resolution")
        name = names[0]
    else:
        raise ValueError(f"a second read-out is not implemented for {denoiser.architecture}")
    old = cast(Conv2d, owner[name] if isinstance(owner, nn.ModuleDict) else getattr(owner, name))
    assert old.weight is not None
    new = Conv2d(old.weight.shape[1], old.weight.shape[0], 3, Initial(weight=0.0))
    owner.add_module(name, ReadOut(old, new))


def copy_denoiser(target: ConditionalDenoiser, source: Denoiser) -> None:
    """Copy a denoiser's weights; tau's read-out is unchanged. ``ValueError`` if the networks differ."""
    state = source.state_dict()
    for name, tensor in target.denoiser.state_dict().items():
        if ".difference." in name:
            state[name] = tensor
        elif ".image." in name:
            state[name] = state.pop(name.replace(".image.", "."))
    try:
        target.denoiser.load_state_dict({name: state[name] for name in target.denoiser.state_dict()})
    except (KeyError, RuntimeError) as error:
        raise ValueError(" ".join(str(error).split())) from None
