"""Common parts of the published U-Nets: plan, resampling, attention, labels and preconditioning.

The U-Nets of Karras et al. 2022 ("EDM": Song's DDPM++ and NCSN++, Dhariwal's ADM) and Karras et al. 2024
("EDM2") have one structure: an encoder with a skip connection from every output, two middle blocks, and a
decoder that uses the skips in reverse order. Module names follow the published checkpoints: ``enc`` and
``dec`` are dictionaries with keys such as ``32x32_block0``; the first two blocks of ``dec`` are the middle.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from diffratio_fast.networks.layers import Dropout

CHANNELS_PER_HEAD = 64


class Entry(NamedTuple):
    """One entry of a U-Net's plan; for ``kind`` "join", ``channels_in`` includes the concatenated skip."""

    name: str
    kind: Literal["stem", "down", "block", "in", "up", "join"]
    level: int
    channels_in: int
    channels_out: int
    attention: bool


def plan(
    resolution: int,
    stem: tuple[int, int],
    channels: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
) -> tuple[list[Entry], list[Entry]]:
    """The entries of encoder and decoder, in order of execution, for ``channels`` at each level.

    ``stem`` is (in, out) channels of the first convolution. Level i has resolution ``resolution`` / 2^i,
    which must be an integer.
    """
    last = len(channels) - 1
    if last < 0 or resolution % 2**last:
        raise ValueError(
            f"img_resolution {resolution} cannot be halved {max(last, 0)} times (channel_mult has "
            f"{last + 1} levels)"
        )
    prefix = [f"{resolution >> level}x{resolution >> level}" for level in range(last + 1)]
    attends = [resolution >> level in attn_resolutions for level in range(last + 1)]
    encoder: list[Entry] = []
    width = stem[1]
    for level, out in enumerate(channels):
        if level == 0:
            encoder.append(Entry(f"{prefix[0]}_conv", "stem", 0, *stem, False))
        else:
            encoder.append(Entry(f"{prefix[level]}_down", "down", level, width, width, False))
        for index in range(num_blocks):
            encoder.append(Entry(f"{prefix[level]}_block{index}", "block", level, width, out, attends[level]))
            width = out
    skips = [entry.channels_out for entry in encoder]
    decoder: list[Entry] = []
    for level in range(last, -1, -1):
        if level == last:
            decoder.append(Entry(f"{prefix[level]}_in0", "in", level, width, width, True))
            decoder.append(Entry(f"{prefix[level]}_in1", "in", level, width, width, False))
        else:
            decoder.append(Entry(f"{prefix[level]}_up", "up", level, width, width, False))
        for index in range(num_blocks + 1):
            joined = width + skips.pop()
            width = channels[level]
            decoder.append(
                Entry(f"{prefix[level]}_block{index}", "join", level, joined, width, attends[level])
            )
    return encoder, decoder


class ResidualBlock(nn.Module):
    """A block ``body(x, embedding)`` with optional activation checkpointing.

    With ``checkpointed`` only the inputs of the block are stored (Chen et al. 2016): a second forward pass
    in exchange for less memory.
    """

    checkpointed = False
    dropout: Dropout
    body: Callable[..., Tensor]  # (x, embedding), or more

    def forward(self, x: Tensor, embedding: Tensor, *more: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            # Philox dropout masks are recomputed without the state of torch's generator
            state = self.training and self.dropout.stream is None
            return checkpoint(self.body, x, embedding, *more, use_reentrant=False, preserve_rng_state=state)
        return self.body(x, embedding, *more)


class UNet(nn.Module):
    """Base class: embedding, encoder, middle and decoder; the published networks implement them."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    level_widths: tuple[int, ...]  # channels of the encoder's last features at each resolution, finest first
    deepest: tuple[int, int, int]  # channels and side of the deepest features, numbers of the embedding

    def scaled(self, x: Tensor, c_in: Tensor, dtype: torch.dtype) -> Tensor:
        """Input of ``encode``: c_in x, for images x [N, C, H, W] and c_in [N], in the network's dtype."""
        return (c_in[:, None, None, None] * x).to(dtype)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """Embedding [N, D] of noise level c_noise [N] and class [N, classes], an input of every block."""
        raise NotImplementedError

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Features of ``scaled`` images after every encoder entry, finest first; the last is the deepest."""
        raise NotImplementedError

    def middle(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Apply the two middle blocks to the deepest features [N, C, h, w]; same shape."""
        for name, block in self.dec.items():
            if name.endswith(("_in0", "_in1")):
                h = block(h, embedding)
        return h

    def decode(self, h: Tensor, features: list[Tensor], embedding: Tensor) -> Tensor:
        """Decode the output of the middle and the features of ``encode`` to an image [N, C, H, W]."""
        skips = list(features)
        for name, layer in self.dec.items():
            if name.endswith("_up"):
                h = layer(h, embedding)
            elif "_block" in name:
                h = self.joined(layer, h, skips.pop(), embedding)
        return self.read(h)

    def joined(self, block: nn.Module, h: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        """Output of a decoder block for the concatenated features of decoder and encoder."""
        return block(torch.cat((h, skip), dim=1), embedding)

    def read(self, h: Tensor) -> Tensor:
        """Map the last features of the decoder to the image."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        embedding = self.embed(c_noise, labels, augment_labels)
        features = self.encode(x, embedding)
        return self.decode(self.middle(features[-1], embedding), features, embedding)

    def remove_decoder(self, *, keep_middle: bool) -> None:
        """Remove the decoder in place, for a ratio network; ``keep_middle`` keeps the two middle blocks.

        The remaining modules keep their names; ``embed``, ``encode`` and (if kept) ``middle`` still work.
        """
        for name in list(self.dec):
            if not (keep_middle and name.endswith(("_in0", "_in1"))):
                del self.dec[name]
        for name in ("out_norm", "out_conv", "out_gain"):
            if hasattr(self, name):
                delattr(self, name)


class Features(NamedTuple):
    """Result of ``Denoiser.encode``: the encoder outputs, finest first, and the embedding [N, D]."""

    maps: list[Tensor]
    embedding: Tensor


class Denoiser(nn.Module):
    """Preconditioning of a U-Net F into a denoiser D (Karras et al. 2022, Eq. 7 and Table 1):

    D(x; sigma, c) = c_skip x + c_out F(c_in x; c_noise, c), c_skip = sigma_data^2 / (sigma^2 + sigma_data^2),
    c_out = sigma sigma_data / sqrt(sigma^2 + sigma_data^2), c_in = 1 / sqrt(sigma^2 + sigma_data^2),
    c_noise = ln(sigma) / 4.

    ``forward(x, sigma, labels)`` takes noised images x [N, img_channels, H, W], noise levels sigma [N] or [],
    in x's units, and labels int64 [N], or float [N, label_dim] (one-hot, or weights of classes), or None
    (no class); a network without classes ignores them. It returns the denoised images, in float32 or, if x
    is float64, in float64: F runs in the dtype of the weights or under autocast, the rest outside it. A label
    out of range raises ``ValueError`` on the CPU and gives NaN for that image on other devices.
    """

    backbone_name: str  # attribute name of F in published checkpoints
    architecture: str = ""  # this and the configuration: the arguments of ``from_published``
    config: dict[str, Any]

    def __init__(self, img_resolution: int, img_channels: int, label_dim: int, sigma_data: float) -> None:
        super().__init__()
        self.img_resolution = img_resolution
        self.img_channels = img_channels
        self.label_dim = label_dim
        self.sigma_data = sigma_data
        self.config = {}

    @property
    def backbone(self) -> UNet:
        """The U-Net F."""
        return getattr(self, self.backbone_name)

    def prepare_pass(self) -> None:
        """Hook before a forward pass in training mode; EDM2 normalizes its weights here."""

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        x = at_least_float32(x)
        out, c_skip, c_out = self.read(x, sigma, labels, augment_labels)
        return c_skip * x + c_out * out

    def read(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """F(c_in x; c_noise, c), c_skip and c_out, the factors [N, 1, 1, 1]; arguments as of ``forward``."""
        self.prepare_pass()
        x = at_least_float32(x)
        sigma = self._sigma(x, sigma)
        variance = (sigma**2 + self.sigma_data**2).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / variance
        c_out = sigma.reshape(-1, 1, 1, 1) * self.sigma_data * variance.rsqrt()
        return self.backbone(*self._inputs(x, sigma, labels, augment_labels)), c_skip, c_out

    def encode(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        middle: bool = False,
    ) -> Features:
        """Encoder features of c_in x, for c_noise and labels as in ``forward``.

        With ``middle`` the two middle blocks' output is appended to the maps.
        """
        self.prepare_pass()
        x = at_least_float32(x)
        inputs, c_noise, classes, augment = self._inputs(x, self._sigma(x, sigma), labels, augment_labels)
        embedding = self.backbone.embed(c_noise, classes, augment)
        maps = self.backbone.encode(inputs, embedding)
        if middle:
            maps = [*maps, self.backbone.middle(maps[-1], embedding)]
        return Features(maps, embedding)

    def _sigma(self, x: Tensor, sigma: Tensor) -> Tensor:
        sigma = torch.as_tensor(sigma, device=x.device).to(x.dtype).reshape(-1)
        count = x.shape[0]  # len(x) would become a constant in torch.export
        if sigma.shape[0] != 1 and sigma.shape[0] != count:
            raise ValueError(f"sigma has {len(sigma)} noise levels for {count} images")
        return sigma.expand(count)

    def _inputs(
        self, x: Tensor, sigma: Tensor, labels: Tensor | None, augment_labels: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if x.ndim != 4 or x.shape[1] != self.img_channels:
            raise ValueError(f"x must be [N, {self.img_channels}, H, W], not {list(x.shape)}")
        dtype = next(self.parameters()).dtype
        c_in = (sigma**2 + self.sigma_data**2).rsqrt()
        classes = class_vectors(labels, self.label_dim, x).to(dtype) if self.label_dim else None
        augment = augment_labels.to(dtype) if augment_labels is not None else None
        return self.backbone.scaled(x, c_in, dtype), sigma.log() / 4, classes, augment


def at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def class_vectors(labels: Tensor | None, classes: int, like: Tensor) -> Tensor:
    """Convert labels of ``Denoiser.forward`` to vectors [N, classes] of ``like``'s dtype and device."""
    count = like.shape[0]
    if labels is None:
        return like.new_zeros(count, classes)
    if labels.is_floating_point() or labels.ndim == 2:
        if labels.ndim != 2 or labels.shape[1] != classes or len(labels) not in (1, count):
            raise ValueError(
                f"labels must be int64 [{count}] or [{count}, {classes}], not {list(labels.shape)}"
            )
        return labels.to(like).expand(count, classes)
    labels = labels.to(like.device).reshape(-1)
    if labels.shape[0] != count and labels.shape[0] != 1:
        raise ValueError(f"{len(labels)} labels for {count} images")
    outside = (labels < 0) | (labels >= classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
        raise ValueError(f"label {int(labels[outside][0])} is out of range; expected 0 to {classes - 1}")
    one_hot = (labels[:, None] == torch.arange(classes, device=like.device)).to(like.dtype)
    return one_hot.masked_fill(outside[:, None], torch.nan).expand(count, classes)


def separable_filter(taps: Sequence[float]) -> Tensor:
    """Two-dimensional resampling filter [1, 1, n, n] of unit sum from n (even) taps."""
    if len(taps) < 2 or len(taps) % 2 or not sum(taps):
        raise ValueError(f"resample_filter needs an even number of taps of non-zero sum, not {list(taps)}")
    line = torch.tensor(list(taps), dtype=torch.float32)
    return (line[:, None] * line / line.sum() ** 2)[None, None]


def is_box(taps: Sequence[float]) -> bool:
    """Whether a resampling filter is the mean of two pixels, which has faster operations."""
    return len(taps) == 2 and taps[0] == taps[1]


def downsample(x: Tensor, kernel: Tensor | None, *, pad: bool = True) -> Tensor:
    """Filter x [N, C, H, W] with kernel [1, 1, n, n] and keep every second pixel: [N, C, H/2, W/2].

    None is the box kernel of 2 by 2 pixels.
    """
    if kernel is None:
        return F.avg_pool2d(x, 2)
    taps = kernel.shape[-1]
    weight = kernel.to(x.dtype).expand(x.shape[1], 1, taps, taps)
    return F.conv2d(x, weight, stride=2, padding=(taps - 1) // 2 if pad else 0, groups=x.shape[1])


def upsample(x: Tensor, kernel: Tensor | None) -> Tensor:
    """Insert zeros between pixels of x [N, C, H, W], filter with 4 kernel: [N, C, 2H, 2W]. None: box."""
    if kernel is None:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    taps = kernel.shape[-1]
    weight = (4 * kernel).to(x.dtype).expand(x.shape[1], 1, taps, taps)
    return F.conv_transpose2d(x, weight, stride=2, padding=(taps - 1) // 2, groups=x.shape[1])


def heads_for(channels: int, channels_per_head: int = CHANNELS_PER_HEAD) -> int:
    """Number of attention heads: 0 (no attention) below ``channels_per_head`` channels."""
    heads = channels // channels_per_head
    if heads and channels % heads:
        raise ValueError(f"{channels} channels cannot be divided by {heads} attention heads")
    return heads


def attend(
    x: Tensor,
    heads: int,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """Self-attention among the pixels of x [N, C, H, W]; ``qkv`` and ``proj`` are (weight, bias) of 1x1 maps.

    The published order of the 3C rows of ``qkv`` is [head][channel][q, k, v]. They are reordered to
    [q, k, v][head][channel]: a small copy of the weights instead of a large copy of the activations, with
    contiguous vectors for the attention kernels. ``split`` maps [N, tokens, 3, heads, C / heads] to q, k and
    v [N, heads, tokens, C / heads].
    """
    count, channels, height, width = x.shape
    tokens = x.flatten(2).transpose(1, 2)
    weight, bias = (None if t is None else t.flatten(1) if t.ndim > 1 else t for t in qkv)
    assert weight is not None
    mixed = F.linear(tokens, _by_role(weight, heads), None if bias is None else _by_role(bias, heads))
    mixed = mixed.reshape(count, height * width, 3, heads, channels // heads)
    query, key, value = mixed.permute(2, 0, 3, 1, 4).unbind(0) if split is None else split(mixed)
    out = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    out = F.linear(out, proj[0].flatten(1), proj[1])
    return out.transpose(1, 2).reshape(count, channels, height, width)


def _by_role(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows from [head][channel][q, k, v] to [q, k, v][head][channel]."""
    return rows.reshape(heads, -1, 3, *rows.shape[1:]).movedim(2, 0).reshape(rows.shape)


class KeepsPrecision(nn.Module):
    """A module that keeps its buffers in float32 when the network is cast to a shorter dtype.

    Fourier frequencies rounded to the 8 significand bits of bfloat16 are useless.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype.itemsize < 4 <= old.dtype.itemsize:
                self._buffers[name] = old.to(buffer.device, torch.float32)
        return self
