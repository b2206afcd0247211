"""One-step generators and ratio networks built from the published U-Nets, and copying their weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.networks.edm2 import Block, EDM2Denoiser, MPConv, MPUNet, force_normalization
from diffratio_fast.networks.edm_layers import GroupNorm
from diffratio_fast.networks.layers import Dropout, Linear, Weight
from diffratio_fast.networks.magnitude import operations
from diffratio_fast.networks.mlp import is_energy
from diffratio_fast.networks.published import from_published, resolved
from diffratio_fast.networks.unet import Denoiser, ResidualBlock, UNet, at_least_float32

POOLS = ("linear", "attention")
HEADS = 4


def build_denoiser(
    shape: tuple[int, int, int], classes: int, backbone: str, options: Mapping[str, Any]
) -> Denoiser:
    """The denoiser of a published architecture for images [C, R, R]; ``classes=1`` means unconditional.

    ``options`` are the published constructor's, except those derived from shape and classes. Raises
    ``ValueError`` for invalid options.
    """
    channels, height, width = shape
    if height != width:
        raise ValueError(f"image size {height} x {width}; the published networks need square images")
    size = {
        "img_resolution": height, "img_channels": channels, "label_dim": classes if classes > 1 else 0
    }  # fmt: skip
    if given := sorted(set(size) & set(options)):
        raise ValueError(f"{given[0]} follows from the data; remove it from --backbone-options")
    return from_published(backbone, {**options, **size})


def set_dropout(network: nn.Module, probability: float) -> None:
    """Set the probability of every dropout layer of a network."""
    for module in network.modules():
        if isinstance(module, Dropout):
            module.probability = probability


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Enable or disable activation checkpointing in every residual block of a network."""
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            module.checkpointed = on


def set_fused(network: nn.Module, on: bool) -> None:
    """Use the fused operations in EDM2 networks where they exist, or plain PyTorch."""
    for module in network.modules():
        if isinstance(module, (Block, MPConv, MPUNet, MPHead)):
            module.fused = on


class BackboneGenerator(nn.Module):
    """One-step generator G(z, c) = D(sigma_init z; sigma_init, c) from a denoiser D.

    Latents [N, C, R, R] and labels int64 [N] to images x0 of the same shape, clamped to ``bounds`` as in
    ``MLPGenerator``. Dropout is disabled: an image is a function of its latent and class.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        backbone: str,
        options: Mapping[str, Any],
        sigma_init: float,
        bounds: tuple[list[float], list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.latent_shape = tuple(shape)
        self.sigma_init = sigma_init
        self.bounded = bounds is not None
        low, high = bounds if bounds is not None else ([0.0], [0.0])
        self.register_buffer("low", torch.tensor(low).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("high", torch.tensor(high).reshape(-1, 1, 1), persistent=False)
        self.denoiser = build_denoiser(shape, classes, backbone, options)
        drop_uncertainty(self.denoiser)
        set_dropout(self.denoiser, 0.0)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        sigma = latents.new_full((1,), self.sigma_init)
        x = self.denoiser(self.sigma_init * latents, sigma, labels)
        return torch.clamp(x, self.low, self.high) if self.bounded else x


class EncoderRatio(nn.Module):
    """Log ratio [N] of noised images [N, C, R, R] from the encoder half of a published U-Net.

    The encoder sees c_in x, c_noise and the class; with ``middle`` its deepest features pass the two middle
    blocks too. They are normalized, activated and read by a head (``EncoderHead``) that starts at zero. With
    ``head`` "energy" an ``EncoderEnergy`` is added to it; ``scaled`` multiplies the result by sigma_data
    c_in. ``dropout`` is that of the residual blocks in training mode.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        backbone: str,
        options: Mapping[str, Any],
        middle: bool = True,
        pool: str = "linear",
        dropout: float = 0.0,
        head: str = "scalar",
        scaled: bool = False,
    ) -> None:
        super().__init__()
        self.middle, self.scaled = middle, scaled
        self.denoiser = build_denoiser(shape, classes, backbone, options)
        drop_uncertainty(self.denoiser)
        if not isinstance(self.denoiser.backbone, UNet):
            raise ValueError(f"the backbone {backbone} has no encoder; use an edm or edm2 backbone")
        self.denoiser.backbone.remove_decoder(keep_middle=middle)
        set_dropout(self.denoiser, dropout)
        channels, side, embedding = self.denoiser.backbone.deepest
        kind = MPHead if isinstance(self.denoiser, EDM2Denoiser) else EncoderHead
        self.head = kind(channels, side * side, embedding, pool)
        widths = self.denoiser.backbone.level_widths
        self.energy = EncoderEnergy(widths, shape[0]) if is_energy(head) else None

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        maps, embedding = self.denoiser.encode(noised, sigma, labels, middle=self.middle)
        c_in = (sigma**2 + self.denoiser.sigma_data**2).rsqrt()
        with torch.autocast(noised.device.type, enabled=False):
            dtype = next(self.head.parameters()).dtype
            log_ratio = self.head(maps[-1].to(dtype), embedding.to(dtype))
            if self.energy is not None:
                images = (c_in.reshape(-1, 1, 1, 1) * noised).to(dtype)
                log_ratio = log_ratio + self.energy(images, [h.to(dtype) for h in maps])
        return log_ratio * (self.denoiser.sigma_data * c_in) if self.scaled else log_ratio


class EncoderEnergy(nn.Module):
    """Energy <u, F> / sqrt(D), [N], of scaled images u [N, C, R, R]; F is read from the encoder's maps.

    At every resolution a 1x1 convolution of the last map there gives an image, and F is the sum of those,
    each enlarged by repeating pixels and divided by the factor. The inner product with it is the factor times
    that with the averaged u, so nothing is enlarged. F starts at zero.
    """

    def __init__(self, widths: Sequence[int], channels: int) -> None:
        super().__init__()
        self.read = nn.ModuleList(Linear(width, channels, gain=0.0) for width in widths)

    def forward(self, images: Tensor, maps: Sequence[Tensor]) -> Tensor:
        last = {h.shape[-1]: h for h in maps}
        energy = images.new_zeros(len(images))
        for read, (side, features) in zip(self.read, sorted(last.items(), reverse=True), strict=True):
            factor = images.shape[-1] // side
            mean = F.avg_pool2d(images, factor) if factor > 1 else images
            rms = features.square().mean((1, 2, 3), keepdim=True) + 1e-6
            image = read(F.silu(features * rms.rsqrt()).movedim(1, 3)).movedim(3, 1)
            energy = energy + (mean * image).flatten(1).sum(1) * factor
        return energy / math.sqrt(images[0].numel())


class EncoderHead(nn.Module):
    """Map features [N, C, h, w] and an embedding [N, D] to a log ratio [N]; the initial output is zero.

    SiLU of the normalized features is pooled to a vector [N, C]: by the mean, or by attention (``HEADS``
    queries, with a bias per position). The result is a linear map of the features at each position (pool
    "linear") or of the pooled vector ("attention"), plus a projection on the class and noise level,
    <V e, pooled> (Miyato and Koyama 2018), which separates many classes.
    """

    def __init__(self, channels: int, positions: int, embedding: int, pool: str) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
        self.pool, self.heads = pool, math.gcd(HEADS, channels)
        self.norm = GroupNorm(channels, eps=1e-6)
        if pool == "attention":
            self.query = Linear(channels, self.heads, bias=False)
            self.position = Weight((self.heads, positions), fan_in=1, gain=0.0)
        self.read = Linear(channels * (positions if pool == "linear" else 1), 1, gain=0.0)
        self.project = Linear(embedding, channels, gain=0.0, bias=False)

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        h = F.silu(self.norm(features)).flatten(2)  # [N, C, P]
        if self.pool == "attention":
            scores = self.query(h.mT).mT + self.position.weight
            pooled = _attention_pool(h, scores)
        else:
            pooled = h.mean(2)
        # over sqrt(P): the effect of an Adam step is independent of the number of positions
        read = self.read(h.flatten(1) / math.sqrt(h.shape[2]) if self.pool == "linear" else pooled)
        return read.squeeze(1) + (self.project(embedding) * pooled).sum(1)


class MPHead(nn.Module):
    """``EncoderHead`` of magnitude-preserving layers: learned gains of zero make the initial output zero.

    Zero weights would be degenerate here, as normalization divides by their length.
    """

    fused = True

    def __init__(self, channels: int, positions: int, embedding: int, pool: str) -> None:
        super().__init__()
        if pool not in POOLS:
            raise ValueError(f"pool must be one of {', '.join(POOLS)}, not {pool!r}")
        self.pool, self.heads = pool, math.gcd(HEADS, channels)
        if pool == "attention":
            self.query = MPConv(channels, self.heads, 0)
            self.position = nn.Parameter(torch.zeros(self.heads, positions))
        self.read = MPConv(channels * (positions if pool == "linear" else 1), 1, 0)
        self.project = MPConv(embedding, channels, 0)
        self.read_gain = nn.Parameter(torch.zeros([]))
        self.project_gain = nn.Parameter(torch.zeros([]))
        self.bias = nn.Parameter(torch.zeros([]))

    def forward(self, features: Tensor, embedding: Tensor) -> Tensor:
        force_normalization(self)
        h = operations(self.fused, features).pixel_norm_silu(features)[1].flatten(2)
        if self.pool == "attention":
            pooled = _attention_pool(h, self.query(h.mT).mT + self.position)
        else:
            pooled = h.mean(2)
        read = self.read(h.flatten(1) if self.pool == "linear" else pooled, gain=self.read_gain)
        projected = self.project(embedding, gain=self.project_gain)
        return read.squeeze(1) + (projected * pooled).sum(1) / math.sqrt(pooled.shape[1]) + self.bias


def _attention_pool(h: Tensor, scores: Tensor) -> Tensor:
    """Average features [N, C, P] with softmax of scores [N, heads, P], one channel group per head: [N, C]."""
    count, channels, positions = h.shape
    weights = at_least_float32(scores).softmax(2).to(h.dtype)
    shares = h.reshape(count, weights.shape[1], channels // weights.shape[1], positions)
    return torch.einsum("nhcp,nhp->nhc", shares, weights).flatten(1)


def drop_uncertainty(denoiser: Denoiser) -> None:
    """Remove the modules that only the denoising loss uses (EDM2's log variance)."""
    for name in ("logvar_fourier", "logvar_linear"):
        if hasattr(denoiser, name):
            delattr(denoiser, name)


def require_same(
    ours: tuple[str, str | Mapping[str, Any]], theirs: tuple[str, str | Mapping[str, Any]]
) -> None:
    """Raise ``ValueError`` if two denoisers, each (architecture, configuration), differ; builds neither."""
    mine, other = resolved(*ours), resolved(*theirs)
    if differing := sorted(name for name in mine | other if mine.get(name) != other.get(name)):
        name = differing[0]
        raise ValueError(f"its {name} is {other.get(name)}; this run needs {mine.get(name)}")


def copy_weights(target: Denoiser, source: Denoiser) -> None:
    """Copy a denoiser's weights, or the part that ``target`` has; raises ``ValueError`` if they differ."""
    require_same((target.architecture, target.config), (source.architecture, source.config))
    state = source.state_dict()
    # augment labels enter through a map without bias, which a network without augmentation does not need
    target.load_state_dict({name: state[name] for name in target.state_dict()})
