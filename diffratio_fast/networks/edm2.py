"""EDM2's magnitude-preserving U-Net and its preconditioning (Karras et al. 2024, "Analyzing and Improving
the Training Dynamics of Diffusion Models"; equation numbers below are that paper's). Options keep their
published names.

Every learned layer preserves the expected magnitude of its input. Weights are normalized in each use; in
training mode the stored weights are normalized too ("forced weight normalization", Section 2.3).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.networks import magnitude
from diffratio_fast.networks.layers import Drawn, Draws, Dropout
from diffratio_fast.networks.magnitude import EPS, mp_silu, mp_sum, normalize, root_mean_square
from diffratio_fast.networks.unet import (
    CHANNELS_PER_HEAD,
    Denoiser,
    Entry,
    KeepsPrecision,
    ResidualBlock,
    UNet,
    at_least_float32,
    attend,
    downsample,
    heads_for,
    is_box,
    plan,
    separable_filter,
    upsample,
)
from diffratio_fast.ops import parameters

EDM2_CHANNELS = {"xxs": 64, "xs": 128, "s": 192, "m": 256, "l": 320, "xl": 384, "xxl": 448}


class MPFourier(KeepsPrecision, Drawn):
    """sqrt(2) cos(freqs c_noise + phases): ``size`` random features (Eq. 75), stored with the weights."""

    freqs: Tensor
    phases: Tensor

    def __init__(self, size: int, bandwidth: float = 1.0) -> None:
        super().__init__()
        self.bandwidth = bandwidth
        self.register_buffer("freqs", torch.empty(size))
        self.register_buffer("phases", torch.empty(size))
        self.draw(Draws())

    @torch.no_grad()
    def draw(self, draws: Draws) -> None:
        self.freqs.copy_(2 * math.pi * self.bandwidth * draws.normal(*self.freqs.shape))
        self.phases.copy_(2 * math.pi * draws.uniform(*self.phases.shape))

    def forward(self, c_noise: Tensor) -> Tensor:
        angle = c_noise[:, None] * self.freqs.to(c_noise.dtype) + self.phases.to(c_noise.dtype)
        return angle.cos() * math.sqrt(2)


class Kept:
    """State of an optimizer that normalizes a stored weight; it may cache the value for the next pass.

    The value is valid for one version of the weight. A copy of a network has no such optimizer.
    """

    def __init__(self, weight: weakref.ref[Tensor], normalized: Tensor | None) -> None:
        self.weight, self.normalized = weight, normalized
        self._version = -1

    def __deepcopy__(self, memo: object) -> None:
        return None

    def take_note(self) -> None:
        """Mark the cached value as that of the current version of the weight."""
        weight = self.weight()
        self._version = -1 if weight is None else weight._version

    def value(self, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
        """The normalized weight, if it is cached in this dtype."""
        known = self.normalized
        if known is None or known.dtype != dtype or weight is not self.weight():
            return None
        return known if weight._version == self._version else None


class MPConv(Drawn):
    """Linear map ([N, in], ``kernel`` 0) or convolution of same size ([N, in, H, W], ``kernel`` odd).

    The weights of each output are normalized to unit length in use (Eq. 47); ``force_normalization`` also
    normalizes the stored weights. ``gain`` multiplies the output.
    ``fused``: use ``ops.parameters`` where it has compiled code.
    """

    fused = True
    kept: Kept | None = None

    def __init__(self, channels_in: int, channels_out: int, kernel: int) -> None:
        super().__init__()
        self.padding = kernel // 2
        sides = (kernel, kernel) if kernel else ()
        self.weight = nn.Parameter(torch.empty(channels_out, channels_in, *sides))
        self.draw(Draws())

    @torch.no_grad()
    def draw(self, draws: Draws) -> None:
        self.weight.copy_(draws.normal(*self.weight.shape))

    def effective_weight(self, gain: Tensor | float = 1.0) -> Tensor:
        """The normalized weights, multiplied by ``gain``; in autocast's dtype if fused."""
        if self.fused and parameters.compiled_for(self.weight):
            return self._normalized() if isinstance(gain, float) and gain == 1 else self._normalized() * gain
        weight = at_least_float32(self.weight)
        scaled = normalize(weight, range(1, weight.ndim)) * (gain / math.sqrt(weight[0].numel()))
        return scaled.to(self.weight.dtype)

    def _normalized(self) -> Tensor:
        kind = self.weight.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else self.weight.dtype
        if self.kept is not None and not torch.compiler.is_compiling():
            known = self.kept.value(self.weight, dtype)
            if known is not None:
                return parameters.known_normalized(self.weight, known)
        return parameters.normalize_weight(self.weight, dtype)

    def forward(self, x: Tensor, gain: Tensor | float = 1.0) -> Tensor:
        weight = self.effective_weight(gain)
        return F.linear(x, weight) if weight.ndim == 2 else F.conv2d(x, weight, padding=self.padding)


@torch.compiler.disable
def force_normalization(network: nn.Module) -> None:
    """Normalize the stored weights of every ``MPConv`` of a network in training mode (Eq. 66).

    Not recorded by autograd, so graphs of earlier forward passes stay valid: after the first call the
    weights change by rounding only. Excluded from compilation: a compiled backward pass may recompute
    parts of the forward pass, and would use the weights normalized in between. Weights whose optimizer
    normalizes them are skipped.
    """
    for module in network.modules():
        if isinstance(module, MPConv) and module.training and module.kept is None:
            stored = module.weight.data
            if hasattr(stored, "to_local"):  # sharded: each process has a part of the rows
                stored = stored.to_local()
            if not stored.numel():
                continue
            # ``normalize`` does not change vectors of this length, so a second forward pass before the
            # next update (gradient accumulation) uses the same weights.
            rms = root_mean_square(stored, list(range(1, stored.ndim))).clamp(min=EPS)
            stored.mul_((1 - EPS) / rms)


class Block(ResidualBlock):
    """Residual block [N, in, H, W] to [N, out, H', W'] given an embedding [N, D].

    Encoder blocks normalize each pixel's feature vector, and their skip convolution precedes the residual
    branch. Decoder blocks do neither, and can have a skip as a second input. ``fused``: use the operations
    of ``ops.edm2`` if available, otherwise plain PyTorch.
    """

    fused = True
    resample_kernel: Tensor | None

    def __init__(
        self,
        entry: Entry,
        embedding: int,
        *,
        encoder: bool,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = CHANNELS_PER_HEAD,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        concat_balance: float = 0.5,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        channels_in, channels_out = entry.channels_in, entry.channels_out
        self.encoder = encoder
        self.resample: Literal["down", "up"] | None = (
            "down" if entry.kind == "down" else "up" if entry.kind == "up" else None
        )
        # A constant of the architecture: a buffer moves with the weights but is not saved.
        kernel = separable_filter(resample_filter)
        self.register_buffer("resample_kernel", None if is_box(resample_filter) else kernel, persistent=False)
        self.dropout = Dropout(dropout)
        self.res_balance = res_balance
        self.attn_balance = attn_balance
        self.concat_balance = concat_balance
        self.clip = math.inf if clip_act is None else clip_act
        self.heads = heads_for(channels_out, channels_per_head) if entry.attention else 0
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(channels_out if encoder else channels_in, channels_out, 3)
        self.emb_linear = MPConv(embedding, channels_out, 0)
        self.conv_res1 = MPConv(channels_out, channels_out, 3)
        self.conv_skip = MPConv(channels_in, channels_out, 1) if channels_in != channels_out else None
        if self.heads:
            self.attn_qkv = MPConv(channels_out, 3 * channels_out, 1)
            self.attn_proj = MPConv(channels_out, channels_out, 1)

    def body(self, x: Tensor, embedding: Tensor, skip: Tensor | None = None) -> Tensor:
        f = magnitude.operations(self.fused, x)
        if self.resample is not None:
            resample = downsample if self.resample == "down" else upsample
            x = resample(x, self.resample_kernel)
        if self.encoder:
            x, h = f.pixel_norm_silu(x if self.conv_skip is None else self.conv_skip(x))
        elif skip is not None:
            x, h = f.cat_silu(x, skip, self.concat_balance)
        else:
            h = f.mp_silu(x)
        condition = self.emb_linear(embedding, gain=self.emb_gain)
        mask = self.dropout.keyed() if f is not magnitude else {}
        h = f.scale_silu(self.conv_res0(h), condition, **mask)
        h = self.conv_res1(h if mask else self.dropout(h))
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        if not self.heads:
            return f.sum_clamp(x, h, self.res_balance, self.clip)
        x = f.sum_clamp(x, h, self.res_balance)
        qkv, proj = self.attn_qkv.effective_weight(), self.attn_proj.effective_weight()
        h = attend(x, self.heads, (qkv, None), (proj, None), f.qkv_norm)
        return f.sum_clamp(x, h, self.attn_balance, self.clip)


class MPUNet(UNet):
    """EDM2's U-Net: images [N, img_channels, R, R] to the same shape.

    A channel of ones is appended to the input and replaces biases. Class vectors are scaled by
    sqrt(classes). ``out_gain`` of zero makes the initial output zero.
    """

    fused = True

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_noise: int | None = None,
        channel_mult_emb: int | None = None,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        label_balance: float = 0.5,
        concat_balance: float = 0.5,
        resample_filter: Sequence[float] = (1, 1),
        channels_per_head: int = CHANNELS_PER_HEAD,
        dropout: float = 0.0,
        res_balance: float = 0.3,
        attn_balance: float = 0.3,
        clip_act: float | None = 256.0,
    ) -> None:
        super().__init__()
        self.label_balance = label_balance
        channels = [model_channels * mult for mult in channel_mult]
        noise = channels[0] if channel_mult_noise is None else model_channels * channel_mult_noise
        embedding = max(channels) if channel_mult_emb is None else model_channels * channel_mult_emb
        self.level_widths = tuple(channels)
        self.deepest = (channels[-1], img_resolution >> (len(channels) - 1), embedding)
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(noise)
        self.emb_noise = MPConv(noise, embedding, 0)
        self.emb_label = MPConv(label_dim, embedding, 0) if label_dim else None

        def block(entry: Entry, *, encoder: bool) -> Block:
            return Block(
                entry,
                embedding,
                encoder=encoder,
                resample_filter=resample_filter,
                channels_per_head=channels_per_head,
                dropout=dropout,
                res_balance=res_balance,
                attn_balance=attn_balance,
                concat_balance=concat_balance,
                clip_act=clip_act,
            )

        encoder, decoder = plan(
            img_resolution, (img_channels + 1, channels[0]), channels, num_blocks, attn_resolutions
        )
        self.enc = nn.ModuleDict(
            {
                entry.name: MPConv(entry.channels_in, entry.channels_out, 3)
                if entry.kind == "stem"
                else block(entry, encoder=True)
                for entry in encoder
            }
        )
        self.dec = nn.ModuleDict({entry.name: block(entry, encoder=False) for entry in decoder})
        self.out_conv = MPConv(channels[0], img_channels, 3)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        if augment_labels is not None:
            raise ValueError("EDM2 networks have no augment labels; omit them")
        h = self.emb_noise(self.emb_fourier(c_noise).to(self.emb_noise.weight.dtype))
        if self.emb_label is not None and labels is not None:
            h = mp_sum(h, self.emb_label(labels * math.sqrt(labels.shape[1])), self.label_balance)
        return mp_silu(h)

    def scaled(self, x: Tensor, c_in: Tensor, dtype: torch.dtype) -> Tensor:
        """c_in x and the channel of ones."""
        if torch.is_autocast_enabled(x.device.type):  # as the first convolution would cast it
            dtype = torch.get_autocast_dtype(x.device.type)
        return magnitude.operations(self.fused, x).ones_channel(x, c_in, dtype)

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for name, layer in self.enc.items():
            features.append(layer(x) if name.endswith("_conv") else layer(features[-1], embedding))
        return features

    def joined(self, block: nn.Module, h: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        return block(h, embedding, skip)

    def read(self, h: Tensor) -> Tensor:
        return self.out_conv(h, gain=self.out_gain)


class EDM2Denoiser(Denoiser):
    """A denoiser with EDM preconditioning around ``unet``, and the learned uncertainty of its loss.

    The constructor has the published options: those named here, and those of the U-Net by keyword.
    ``use_fp16`` is accepted and ignored: autocast or the dtype of the weights sets the precision.
    """

    backbone_name = "unet"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = True,
        sigma_data: float = 0.5,
        logvar_channels: int = 128,
        **unet_kwargs: object,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, sigma_data)
        self.unet = MPUNet(img_resolution, img_channels, label_dim, **unet_kwargs)  # type: ignore[arg-type]
        self.logvar_fourier = MPFourier(logvar_channels)
        self.logvar_linear = MPConv(logvar_channels, 1, 0)

    def prepare_pass(self) -> None:
        force_normalization(self)

    def log_variance(self, sigma: Tensor) -> Tensor:
        """u(sigma) [N], the learned log variance of the denoising error at sigma [N]."""
        force_normalization(self.logvar_linear)
        features = self.logvar_fourier(at_least_float32(sigma).reshape(-1).log() / 4)
        return self.logvar_linear(features.to(self.logvar_linear.weight.dtype)).squeeze(1)
