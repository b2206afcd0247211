"""What the published U-Nets have in common: plan, resampling, attention, labels and preconditioning.

The U-Nets of Karras et al. 2022 ("EDM": Song's DDPM++ and NCSN++, Dhariwal's ADM) and Karras et al. 2024
("EDM2") are one skeleton: an encoder whose every output is kept as a skip, two blocks in the middle, and a
decoder that takes the skips from last to first. Module names follow the published checkpoints: ``enc`` and
``dec`` are dictionaries with keys such as ``32x32_block0``; the two middle blocks are ``dec``'s first.
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
    """One entry of a U-Net's plan; ``channels_in`` counts the concatenated skip where ``kind`` is "join"."""

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

    ``stem`` is the first convolution's (in, out) channels. Level i works at ``resolution`` / 2^i, which must
    be whole.
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
    """A block, ``body``, whose activations are kept for the backward pass, or computed again.

    With ``checkpointed`` only the block's inputs are kept (Chen et al. 2016): a second forward pass for less
    memory.
    """

    checkpointed = False
    dropout: Dropout
    body: Callable[..., Tensor]  # (x, embedding), or more

    def forward(self, x: Tensor, embedding: Tensor, *more: Tensor) -> Tensor:
        if self.checkpointed and torch.is_grad_enabled():
            # masks of the noise contract need no generator's state to be drawn again
            state = self.training and self.dropout.stream is None
            return checkpoint(self.body, x, embedding, *more, use_reentrant=False, preserve_rng_state=state)
        return self.body(x, embedding, *more)


class UNet(nn.Module):
    """Embedding, encoder, middle and decoder as four functions; the published networks fill them in."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    level_widths: tuple[int, ...]  # channels of the encoder's last features at each resolution, finest first
    deepest: tuple[int, int, int]  # channels and side of the deepest features, numbers of the embedding

    def scaled(self, x: Tensor, c_in: Tensor, dtype: torch.dtype) -> Tensor:
        """What ``encode`` takes: c_in x, of images x [N, C, H, W] and c_in [N], in the network's dtype."""
        return (c_in[:, None, None, None] * x).to(dtype)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        """The vectors [N, D] that tell every block the noise level c_noise [N] and the class [N, classes]."""
        raise NotImplementedError

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        """Features of ``scaled`` images after every encoder entry, finest first; the last is the deepest."""
        raise NotImplementedError

    def middle(self, h: Tensor, embedding: Tensor) -> Tensor:
        """The deepest features [N, C, h, w] through the two middle blocks; same shape."""
        for name, block in self.dec.items():
            if name.endswith(("_in0", "_in1")):
                h = block(h, embedding)
        return h

    def decode(self, h: Tensor, features: list[Tensor], embedding: Tensor) -> Tensor:
        """The image [N, C, H, W] from the middle's output and what ``encode`` returned."""
        skips = list(features)
        for name, layer in self.dec.items():
            if name.endswith("_up"):
                h = layer(h, embedding)
            elif "_block" in name:
                h = self.joined(layer, h, skips.pop(), embedding)
        return self.read(h)

    def joined(self, block: nn.Module, h: Tensor, skip: Tensor, embedding: Tensor) -> Tensor:
        """A decoder block's output for its features and the encoder's, side by side."""
        return block(torch.cat((h, skip), dim=1), embedding)

    def read(self, h: Tensor) -> Tensor:
        """The image from the decoder's last features."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None = None
    ) -> Tensor:
        embedding = self.embed(c_noise, labels, augment_labels)
        features = self.encode(x, embedding)
        return self.decode(self.middle(features[-1], embedding), features, embedding)

    def remove_decoder(self, *, keep_middle: bool) -> None:
        """Keep the encoder half, with or without the two middle blocks, for a ratio network; in place.

        What is left keeps its names, and ``embed``, ``encode`` and (if kept) ``middle`` work as before.
        """
        for name in list(self.dec):
            if not (keep_middle and name.endswith(("_in0", "_in1"))):
                del self.dec[name]
        for name in ("out_norm", "out_conv", "out_gain"):
            if hasattr(self, name):
                delattr(self, name)


class Features(NamedTuple):
    """What ``Denoiser.encode`` returns: the encoder's outputs, finest first, and the embedding [N, D]."""

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
    out of range is a ``ValueError`` on the CPU and NaN for that image elsewhere.
    """

    backbone_name: str  # of the attribute under which published checkpoints keep F
    architecture: str = ""  # both as given to ``from_published``
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
        """What a network does to its weights in training mode before it uses them, if anything."""

    def forward(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
    ) -> Tensor:
        self.prepare_pass()
        x = at_least_float32(x)
        sigma = self._sigma(x, sigma)
        variance = (sigma**2 + self.sigma_data**2).reshape(-1, 1, 1, 1)
        c_skip = self.sigma_data**2 / variance
        c_out = sigma.reshape(-1, 1, 1, 1) * self.sigma_data * variance.rsqrt()
        out = self.backbone(*self._inputs(x, sigma, labels, augment_labels))
        return c_skip * x + c_out * out

    def encode(
        self,
        x: Tensor,
        sigma: Tensor,
        labels: Tensor | None = None,
        augment_labels: Tensor | None = None,
        *,
        middle: bool = False,
    ) -> Features:
        """The encoder half's features of c_in x, given c_noise and the labels as ``forward`` takes them.

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
        if len(sigma) not in (1, len(x)):
            raise ValueError(f"sigma holds {len(sigma)} noise levels for {len(x)} images")
        return sigma.expand(len(x))

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
    """Labels as ``Denoiser.forward`` takes them to vectors [N, classes] of ``like``'s dtype and device."""
    count = len(like)
    if labels is None:
        return like.new_zeros(count, classes)
    if labels.is_floating_point() or labels.ndim == 2:
        if labels.ndim != 2 or labels.shape[1] != classes or len(labels) not in (1, count):
            raise ValueError(
                f"labels must be int64 [{count}] or [{count}, {classes}], not {list(labels.shape)}"
            )
        return labels.to(like).expand(count, classes)
    labels = labels.to(like.device).reshape(-1)
    if len(labels) not in (1, count):
        raise ValueError(f"{len(labels)} labels for {count} images")
    outside = (labels < 0) | (labels >= classes)
    if labels.device.type == "cpu" and not torch.compiler.is_compiling() and bool(outside.any()):
        raise ValueError(f"label {int(labels[outside][0])} is not among the classes 0 to {classes - 1}")
    one_hot = (labels[:, None] == torch.arange(classes, device=like.device)).to(like.dtype)
    return one_hot.masked_fill(outside[:, None], torch.nan).expand(count, classes)


def separable_filter(taps: Sequence[float]) -> Tensor:
    """The two-dimensional resampling filter [1, 1, n, n] of n (even) taps, of unit sum."""
    if len(taps) < 2 or len(taps) % 2 or not sum(taps):
        raise ValueError(f"resample_filter needs an even number of taps of non-zero sum, not {list(taps)}")
    line = torch.tensor(list(taps), dtype=torch.float32)
    return (line[:, None] * line / line.sum() ** 2)[None, None]


def is_box(taps: Sequence[float]) -> bool:
    """Whether a resampling filter is the mean of two pixels, for which there are faster operations."""
    return len(taps) == 2 and taps[0] == taps[1]


def downsample(x: Tensor, kernel: Tensor | None, *, pad: bool = True) -> Tensor:
    """Filter x [N, C, H, W] by kernel [1, 1, n, n], keep every second pixel: [N, C, H/2, W/2].

    None is the box kernel of 2 by 2 pixels.
    """
    if kernel is None:
        return F.avg_pool2d(x, 2)
    taps = kernel.shape[-1]
    weight = kernel.to(x.dtype).expand(x.shape[1], 1, taps, taps)
    return F.conv2d(x, weight, stride=2, padding=(taps - 1) // 2 if pad else 0, groups=x.shape[1])


def upsample(x: Tensor, kernel: Tensor | None) -> Tensor:
    """Put zeros between the pixels of x [N, C, H, W] and filter by 4 kernel: [N, C, 2H, 2W]. None: box."""
    if kernel is None:
        return F.interpolate(x, scale_factor=2, mode="nearest")
    taps = kernel.shape[-1]
    weight = (4 * kernel).to(x.dtype).expand(x.shape[1], 1, taps, taps)
    return F.conv_transpose2d(x, weight, stride=2, padding=(taps - 1) // 2, groups=x.shape[1])


def heads_for(channels: int, channels_per_head: int = CHANNELS_PER_HEAD) -> int:
    """Heads of an attention block, none (and no attention) below ``channels_per_head`` channels."""
    heads = channels // channels_per_head
    if heads and channels % heads:
        raise ValueError(f"{channels} channels cannot be shared by {heads} attention heads")
    return heads


def attend(
    x: Tensor,
    heads: int,
    qkv: tuple[Tensor, Tensor | None],
    proj: tuple[Tensor, Tensor | None],
    split: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> Tensor:
    """Self-attention among the pixels of x [N, C, H, W]; ``qkv`` and ``proj`` are (weight, bias) of 1x1 maps.

    The published order of the 3C rows of ``qkv`` is [head][channel][q, k, v]. They are brought into
    [q, k, v][head][channel] here: a small copy of the weights in place of a large one of the activations,
    and the attention kernels get contiguous vectors. ``split`` makes [N, heads, tokens, C / heads] of each
    from [N, tokens, 3, heads, C / heads].
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
    """Rows in order [head][channel][q, k, v] to [q, k, v][head][channel]."""
    return rows.reshape(heads, -1, 3, *rows.shape[1:]).movedim(2, 0).reshape(rows.shape)


class KeepsPrecision(nn.Module):
    """A module whose buffers stay in float32 when the network is cast to a shorter type.

    Frequencies of a noise level's Fourier features lose all meaning when rounded to eight bits.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsPrecision:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype.itemsize < 4 <= old.dtype.itemsize:
                self._buffers[name] = old.to(buffer.device, torch.float32)
        return self
