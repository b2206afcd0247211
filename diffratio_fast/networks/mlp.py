"""Networks of dense layers for small images: generator, ratio network, denoiser."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffratio_fast.networks.layers import Embedding, FourierFeatures, Linear
from diffratio_fast.networks.unet import Denoiser

HEADS = ("scalar", "energy")


class MLPGenerator(nn.Module):
    """One-step generator: latents [N, latent_size] and labels int64 [N] to images x0 [N, C, H, W].

    ``bounds`` (low, high; one number per channel, in units of x0) is the range of the data. All images are
    clamped to it, for training, evaluation and output. None means unbounded data.
    """

    low: Tensor
    high: Tensor

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        latent_size: int,
        width: int,
        depth: int,
        bounds: tuple[list[float], list[float]] | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.latent_shape = (latent_size,)
        self.bounded = bounds is not None
        low, high = bounds if bounds is not None else ([0.0], [0.0])
        self.register_buffer("low", torch.tensor(low).reshape(-1, 1, 1), persistent=False)
        self.register_buffer("high", torch.tensor(high).reshape(-1, 1, 1), persistent=False)
        self.embed = Embedding(classes, width)
        self.first = Linear(latent_size, width)
        self.hidden = nn.ModuleList(Linear(width, width, gain=1.4) for _ in range(depth - 1))
        self.last = Linear(width, math.prod(shape), gain=0.5)

    def forward(self, latents: Tensor, labels: Tensor) -> Tensor:
        h = silu(self.first(latents) + self.embed(labels))
        for layer in self.hidden:
            h = silu(layer(h))
        x = self.last(h).reshape(-1, *self.shape)
        return torch.clamp(x, self.low, self.high) if self.bounded else x


def is_energy(head: str) -> bool:
    """Whether a ratio network's head is "energy" and not "scalar"; another name raises ``ValueError``."""
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, not {head}")
    return head == "energy"


class MLPRatio(nn.Module):
    """Log ratio [N] of noised images [N, C, H, W] given sigma [N] and labels int64 [N]: a residual MLP.

    The input is scaled by c_in = 1 / sqrt(sigma^2 + sigma_data^2) (Karras et al. 2022); noise level and
    class give every layer its own bias. ``head`` "scalar" reads one number f from the features, "energy"
    f + <c_in x, F> / sqrt(D) with an image F of D numbers. ``scaled`` multiplies the result by
    sigma_data c_in. The result starts at zero.
    """

    CONDITION = 64

    def __init__(
        self,
        shape: tuple[int, int, int],
        classes: int,
        *,
        width: int,
        depth: int,
        head: str = "scalar",
        scaled: bool = False,
        sigma_data: float = 0.5,
    ) -> None:
        super().__init__()
        self.energy, self.scaled, self.sigma_data = is_energy(head), scaled, sigma_data
        self.fourier = FourierFeatures(16, low=0.25, high=4.0)
        self.noise = Linear(self.fourier.size, self.CONDITION)
        self.embed = Embedding(classes, self.CONDITION)
        self.biases = Linear(self.CONDITION, width * depth)
        self.first = Linear(math.prod(shape), width, gain=2.0)
        self.blocks = nn.ModuleList(Linear(width, width) for _ in range(depth))
        self.last = Linear(width, 1 + self.energy * math.prod(shape), gain=0.0)

    def forward(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        condition = silu(self.noise(self.fourier(sigma.log())) + self.embed(labels))
        biases = self.biases(condition).chunk(len(self.blocks), dim=1)
        x = noised.flatten(1) * c_in[:, None]
        h = self.first(x)
        for block, bias in zip(self.blocks, biases, strict=True):
            h = h + silu(block(h) + bias)
        read = self.last(h)
        log_ratio = read[:, 0]
        if self.energy:
            log_ratio = log_ratio + (x * read[:, 1:]).sum(1) / math.sqrt(x.shape[1])
        return log_ratio * (self.sigma_data * c_in) if self.scaled else log_ratio


class DenseNet(nn.Module):
    """F of ``MLPDenoiser``: scaled images [N, C, R, R], c_noise [N] and class vectors to the same shape."""

    CONDITION = 64

    def __init__(self, pixels: int, classes: int, width: int, depth: int) -> None:
        super().__init__()
        self.fourier = FourierFeatures(16, low=0.25, high=4.0)
        self.noise = Linear(self.fourier.size, self.CONDITION)
        self.embed = Linear(classes, self.CONDITION, gain=math.sqrt(classes), bias=False) if classes else None
        self.biases = Linear(self.CONDITION, width * depth)
        self.first = Linear(pixels, width, gain=2.0)
        self.blocks = nn.ModuleList(Linear(width, width) for _ in range(depth))
        self.last = Linear(width, pixels, gain=0.0)

    def scaled(self, x: Tensor, c_in: Tensor, dtype: torch.dtype) -> Tensor:
        """Input of ``forward``: c_in x, of images x [N, C, R, R] and c_in [N], in the network's dtype."""
        return (c_in[:, None, None, None] * x).to(dtype)

    def forward(
        self, x: Tensor, c_noise: Tensor, classes: Tensor | None = None, augment: Tensor | None = None
    ) -> Tensor:
        if augment is not None:
            raise ValueError("the dense denoiser has no augment labels; omit them")
        condition = self.noise(self.fourier(4 * c_noise))  # c_noise is log sigma / 4
        if self.embed is not None and classes is not None:
            condition = condition + self.embed(classes)
        biases = self.biases(silu(condition)).chunk(len(self.blocks), dim=1)
        h = self.first(x.flatten(1))
        for block, bias in zip(self.blocks, biases, strict=True):
            h = h + silu(block(h) + bias)
        return self.last(h).reshape(len(x), -1, *x.shape[2:])


class MLPDenoiser(Denoiser):
    """A denoiser of dense layers with EDM preconditioning, built like ``MLPRatio``."""

    backbone_name = "model"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        sigma_data: float = 0.5,
        width: int = 256,
        depth: int = 4,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, sigma_data)
        self.model = DenseNet(img_channels * img_resolution**2, label_dim, width, depth)
