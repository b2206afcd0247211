"""Layers of the EDM networks (Karras et al. 2022, Appendix F), under their published names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import silu

from diffratio_fast.networks.layers import Drawn, Draws, Dropout
from diffratio_fast.networks.unet import (
    KeepsPrecision,
    ResidualBlock,
    at_least_float32,
    attend,
    downsample,
    is_box,
    separable_filter,
    upsample,
)

Resample = Literal["keep", "down", "up"]


class Initial(NamedTuple):
    """Initial distribution of a layer's weights.

    "xavier": uniform with variance ``weight``^2 * 2 / (fan_in + fan_out). "kaiming": uniform with variance
    ``weight``^2 / fan_in. Biases use ``bias`` in the same formula. "normal": standard normal.
    """

    law: Literal["xavier", "kaiming", "normal"] = "xavier"
    weight: float = 1.0
    bias: float = 0.0

    @torch.no_grad()
    def draw(self, weight: Tensor, bias: Tensor | None, draws: Draws) -> None:
        if self.law == "normal":
            weight.copy_(draws.normal(*weight.shape))
            return
        area = math.prod(weight.shape[2:])
        fan_in, fan_out = weight.shape[1] * area, weight.shape[0] * area
        limit = math.sqrt(6 / (fan_in + fan_out) if self.law == "xavier" else 3 / fan_in)
        for tensor, scale in ((weight, self.weight), (bias, self.bias)):
            if tensor is not None:
                tensor.copy_((2 * draws.uniform(*tensor.shape) - 1) * (limit * scale))


class Linear(Drawn):
    """Linear map of x [N, in] to [N, out]."""

    bias: nn.Parameter | None

    def __init__(
        self, features_in: int, features_out: int, initial: Initial | None = None, *, bias: bool = True
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(features_out, features_in))
        self.register_parameter("bias", nn.Parameter(torch.empty(features_out)) if bias else None)
        self.initial = initial or Initial()
        self.draw(Draws())

    def draw(self, draws: Draws) -> None:
        self.initial.draw(self.weight, self.bias, draws)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class Conv2d(Drawn):
    """Convolution of the same size with an odd ``kernel``, after down- or upsampling by 2.

    ``kernel`` 0 only resamples. ``fused`` (with "down") convolves first and pads by the margin that the
    filter needs, so that no padding is between the two.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    resample_filter: Tensor

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        kernel: int,
        initial: Initial | None = None,
        *,
        resample: Resample = "keep",
        resample_filter: Sequence[float] = (1, 1),
        fused: bool = False,
    ) -> None:
        super().__init__()
        assert not fused or (resample == "down" and kernel)
        self.resample = resample
        self.fused = fused
        self.padding = kernel // 2
        self.box = is_box(resample_filter)
        shape = (channels_out, channels_in, kernel, kernel)
        self.register_parameter("weight", nn.Parameter(torch.empty(shape)) if kernel else None)
        self.register_parameter("bias", nn.Parameter(torch.empty(channels_out)) if kernel else None)
        self.initial = initial or Initial()
        self.draw(Draws())
        if resample != "keep":
            self.register_buffer("resample_filter", separable_filter(resample_filter))

    def draw(self, draws: Draws) -> None:
        if self.weight is not None:
            self.initial.draw(self.weight, self.bias, draws)

    def forward(self, x: Tensor) -> Tensor:
        kernel = None if self.resample == "keep" or self.box else self.resample_filter
        if self.fused and self.weight is not None:
            margin = (self.resample_filter.shape[-1] - 1) // 2
            x = F.conv2d(x, self.weight, self.bias, padding=self.padding + margin)
            return downsample(x, kernel, pad=False)
        if self.resample == "down":
            x = downsample(x, kernel)
        elif self.resample == "up":
            x = upsample(x, kernel)
        return x if self.weight is None else F.conv2d(x, self.weight, self.bias, padding=self.padding)


class GroupNorm(nn.Module):
    """Group normalization in float32: at most 32 groups of at least four channels."""

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.groups = min(32, channels // 4)
        if not self.groups or channels % self.groups:
            raise ValueError(
                f"{channels} channels cannot be divided into {max(self.groups, 1)} groups of four or more"
            )
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        full = at_least_float32(x)
        weight, bias = self.weight.to(full.dtype), self.bias.to(full.dtype)
        return F.group_norm(full, self.groups, weight, bias, self.eps).to(x.dtype)


class PositionalEmbedding(nn.Module):
    """[cos, sin] of c_noise [N] at ``size`` / 2 frequencies from 1 down to 1/10000: [N, size] in float32.

    With ``endpoint`` the last frequency is 1/10000; without it, 1/10000 is the next one.
    """

    def __init__(self, size: int, *, endpoint: bool) -> None:
        super().__init__()
        self.size = size
        self.endpoint = endpoint

    def forward(self, c_noise: Tensor) -> Tensor:
        half = self.size // 2
        steps = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
        angle = c_noise[:, None] * 1e-4 ** (steps / (half - self.endpoint))
        return torch.cat((angle.cos(), angle.sin()), dim=1)


class FourierEmbedding(KeepsPrecision, Drawn):
    """[cos, sin] of c_noise [N] at ``size`` / 2 random frequencies of std ``scale``, a stored buffer."""

    freqs: Tensor

    def __init__(self, size: int, scale: float = 16.0) -> None:
        super().__init__()
        self.scale = scale
        self.register_buffer("freqs", torch.empty(size // 2))
        self.draw(Draws())

    @torch.no_grad()
    def draw(self, draws: Draws) -> None:
        self.freqs.copy_(draws.normal(*self.freqs.shape) * self.scale)

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * (2 * math.pi * self.freqs.to(c_noise.dtype))
        return torch.cat((angle.cos(), angle.sin()), dim=1)


class BlockStyle(NamedTuple):
    """The options that differ between Song's and Dhariwal's residual blocks."""

    embedding: int
    dropout: float
    eps: float
    initial: Initial
    initial_last: Initial
    initial_qkv: Initial
    scale_shift: (
        bool  # the embedding scales and shifts the output of the second norm; otherwise it is added before it
    )
    project_resampled: bool  # a resampled skip has a 1x1 convolution even if the channels are equal
    skip_scale: float
    resample_filter: Sequence[float]


class UNetBlock(ResidualBlock):
    """Residual block [N, in, H, W] to [N, out, H', W'] given an embedding [N, D]; attention by ``heads``."""

    def __init__(
        self, channels_in: int, channels_out: int, style: BlockStyle, *, resample: Resample, heads: int
    ) -> None:
        super().__init__()
        self.style = style
        self.heads = heads
        scaling = {"resample": resample, "resample_filter": style.resample_filter}
        self.norm0 = GroupNorm(channels_in, style.eps)
        self.conv0 = Conv2d(channels_in, channels_out, 3, style.initial, **scaling)  # type: ignore[arg-type]
        self.affine = Linear(style.embedding, channels_out * (2 if style.scale_shift else 1), style.initial)
        self.norm1 = GroupNorm(channels_out, style.eps)
        self.dropout = Dropout(style.dropout)
        self.conv1 = Conv2d(channels_out, channels_out, 3, style.initial_last)
        self.skip: Conv2d | None = None
        if channels_in != channels_out or resample != "keep":
            kernel = 1 if style.project_resampled or channels_in != channels_out else 0
            self.skip = Conv2d(channels_in, channels_out, kernel, style.initial, **scaling)  # type: ignore[arg-type]
        if heads:
            self.norm2 = GroupNorm(channels_out, style.eps)
            self.qkv = Conv2d(channels_out, 3 * channels_out, 1, style.initial_qkv)
            self.proj = Conv2d(channels_out, channels_out, 1, style.initial_last)

    def body(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv0(silu(self.norm0(x)))
        condition = self.affine(embedding)[:, :, None, None]
        if self.style.scale_shift:
            scale, shift = condition.chunk(2, dim=1)
            h = silu(torch.addcmul(shift, self.norm1(h), scale + 1))
        else:
            h = silu(self.norm1(h + condition))
        h = self.conv1(self.dropout(h))
        x = (h + (x if self.skip is None else self.skip(x))) * self.style.skip_scale
        if self.heads:
            qkv, proj = (self.qkv.weight, self.qkv.bias), (self.proj.weight, self.proj.bias)
            h = attend(self.norm2(x), self.heads, qkv, proj)  # type: ignore[arg-type]
            x = (h + x) * self.style.skip_scale
        return x
