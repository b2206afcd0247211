"""The EDM networks: DDPM++ and NCSN++ (``SongUNet``), ADM (``DhariwalUNet``), and their preconditioning.

From Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models" (Appendix F),
after Song et al. 2021 and Dhariwal and Nichol 2021. Options keep their published names.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from diffratio_fast.networks.edm_layers import (
    BlockStyle,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Initial,
    Linear,
    PositionalEmbedding,
    Resample,
    UNetBlock,
)
from diffratio_fast.networks.layers import Dropout
from diffratio_fast.networks.unet import Denoiser, Entry, UNet, heads_for, plan

_RESAMPLE: dict[str, Resample] = {"down": "down", "up": "up"}


def _drop_labels(labels: Tensor, dropout: Dropout) -> Tensor:
    """Labels [N, classes]; in training mode, rows are zeroed with the probability of ``dropout``."""
    if not dropout.training or not dropout.probability:
        return labels
    return labels * dropout.kept(1, labels).to(labels.dtype)


def _one_of(name: str, value: str, *choices: str) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


class SongUNet(UNet):
    """DDPM++ (``embedding_type`` positional, ``encoder_type`` standard) and NCSN++ (fourier, residual).

    Images [N, in_channels, R, R] to [N, out_channels, R, R]. An encoder or decoder of type "skip" has an
    image pyramid in parallel with the features; an encoder of type "residual" adds one to the features.
    Class vectors are scaled by sqrt(classes). Augment labels [N, augment_dim] are optional.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
        embedding_type: Literal["fourier", "positional"] = "positional",
        channel_mult_noise: int = 1,
        encoder_type: Literal["standard", "skip", "residual"] = "standard",
        decoder_type: Literal["standard", "skip"] = "standard",
        resample_filter: Sequence[float] = (1, 1),
    ) -> None:
        _one_of("embedding_type", embedding_type, "fourier", "positional")
        _one_of("encoder_type", encoder_type, "standard", "skip", "residual")
        _one_of("decoder_type", decoder_type, "standard", "skip")
        super().__init__()
        self.label_dropout = Dropout(label_dropout)
        noise, embedding = model_channels * channel_mult_noise, model_channels * channel_mult_emb
        initial, initial_last = Initial(), Initial(weight=1e-5)
        style = BlockStyle(
            embedding=embedding,
            dropout=dropout,
            eps=1e-6,
            initial=initial,
            initial_last=initial_last,
            initial_qkv=Initial(weight=math.sqrt(0.2)),
            scale_shift=False,
            project_resampled=True,
            skip_scale=math.sqrt(0.5),
            resample_filter=resample_filter,
        )
        self.map_noise = (
            FourierEmbedding(noise)
            if embedding_type == "fourier"
            else PositionalEmbedding(noise, endpoint=True)
        )
        self.map_label = Linear(label_dim, noise, initial) if label_dim else None
        self.map_augment = Linear(augment_dim, noise, initial, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise, embedding, initial)
        self.map_layer1 = Linear(embedding, embedding, initial)

        channels = [model_channels * mult for mult in channel_mult]
        self.level_widths = tuple(channels)
        self.deepest = (channels[-1], img_resolution >> (len(channels) - 1), embedding)
        encoder, decoder = plan(
            img_resolution, (in_channels, model_channels), channels, num_blocks, attn_resolutions
        )
        self.enc = nn.ModuleDict()
        pyramid = in_channels  # channels of the image pyramid
        for entry in encoder:
            if entry.kind == "stem":
                self.enc[entry.name] = Conv2d(entry.channels_in, entry.channels_out, 3, initial)
                continue
            self.enc[entry.name] = _block(entry, style, heads=int(entry.attention))
            prefix = entry.name.partition("_")[0]
            if entry.kind == "down" and encoder_type == "skip":
                self.enc[f"{prefix}_aux_down"] = Conv2d(
                    pyramid, pyramid, 0, resample="down", resample_filter=resample_filter
                )
                self.enc[f"{prefix}_aux_skip"] = Conv2d(pyramid, entry.channels_out, 1, initial)
            elif entry.kind == "down" and encoder_type == "residual":
                self.enc[f"{prefix}_aux_residual"] = Conv2d(
                    pyramid, entry.channels_out, 3, initial,
                    resample="down", resample_filter=resample_filter, fused=True,
                )  # fmt: skip
                pyramid = entry.channels_out

        self.dec = nn.ModuleDict()
        for number, entry in enumerate(decoder):
            # In a decoder level only the last block has attention; the first middle block always has it.
            level_ends = number + 1 == len(decoder) or decoder[number + 1].level != entry.level
            attention = entry.attention and (entry.kind == "in" or level_ends)
            self.dec[entry.name] = _block(entry, style, heads=int(attention))
            if level_ends and (decoder_type == "skip" or entry.level == 0):
                prefix = entry.name.partition("_")[0]
                if decoder_type == "skip" and entry.level < len(channels) - 1:
                    self.dec[f"{prefix}_aux_up"] = Conv2d(
                        out_channels, out_channels, 0, resample="up", resample_filter=resample_filter
                    )
                self.dec[f"{prefix}_aux_norm"] = GroupNorm(entry.channels_out, eps=1e-6)
                self.dec[f"{prefix}_aux_conv"] = Conv2d(entry.channels_out, out_channels, 3, initial_last)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        cos, sin = self.map_noise(c_noise).chunk(2, dim=1)
        h = torch.cat((sin, cos), dim=1).to(self.map_layer0.weight.dtype)  # swapped, as published
        if self.map_label is not None and labels is not None:
            labels = _drop_labels(labels, self.label_dropout)
            h = h + self.map_label(labels * math.sqrt(labels.shape[1]))
        if self.map_augment is not None and augment_labels is not None:
            h = h + self.map_augment(augment_labels)
        return silu(self.map_layer1(silu(self.map_layer0(h))))

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        pyramid = x
        for name, layer in self.enc.items():
            if name.endswith("aux_down"):
                pyramid = layer(pyramid)
            elif name.endswith("aux_skip"):
                features[-1] = features[-1] + layer(pyramid)
            elif name.endswith("aux_residual"):
                features[-1] = pyramid = (features[-1] + layer(pyramid)) * math.sqrt(0.5)
            elif name.endswith("_conv"):
                features.append(layer(x))
            else:
                features.append(layer(features[-1], embedding))
        return features

    def decode(self, h: Tensor, features: list[Tensor], embedding: Tensor) -> Tensor:
        skips = list(features)
        image: Tensor | None = None
        normed = h
        for name, layer in self.dec.items():
            if name.endswith("aux_up"):
                image = layer(image)
            elif name.endswith("aux_norm"):
                normed = silu(layer(h))
            elif name.endswith("aux_conv"):
                image = layer(normed) if image is None else image + layer(normed)
            elif name.endswith("_up"):
                h = layer(h, embedding)
            elif "_block" in name:
                h = self.joined(layer, h, skips.pop(), embedding)
        assert image is not None
        return image


class DhariwalUNet(UNet):
    """ADM: images [N, in_channels, R, R] to [N, out_channels, R, R].

    Attention heads of 64 channels; embeddings scale and shift. Class vectors are not scaled and are added
    after the layers of the noise level.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.10,
        label_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.label_dropout = Dropout(label_dropout)
        embedding = model_channels * channel_mult_emb
        initial = Initial("kaiming", math.sqrt(1 / 3), math.sqrt(1 / 3))
        zero = Initial("kaiming", 0.0, 0.0)
        style = BlockStyle(
            embedding=embedding,
            dropout=dropout,
            eps=1e-5,
            initial=initial,
            initial_last=zero,
            initial_qkv=initial,
            scale_shift=True,
            project_resampled=False,
            skip_scale=1.0,
            resample_filter=(1, 1),
        )
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = Linear(augment_dim, model_channels, zero, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, embedding, initial)
        self.map_layer1 = Linear(embedding, embedding, initial)
        self.map_label: Linear | None = None
        if label_dim:
            self.map_label = Linear(label_dim, embedding, Initial("normal"), bias=False)

        channels = [model_channels * mult for mult in channel_mult]
        self.level_widths = tuple(channels)
        self.deepest = (channels[-1], img_resolution >> (len(channels) - 1), embedding)
        encoder, decoder = plan(
            img_resolution, (in_channels, channels[0]), channels, num_blocks, attn_resolutions
        )
        self.enc = nn.ModuleDict(
            {
                entry.name: Conv2d(entry.channels_in, entry.channels_out, 3, initial)
                if entry.kind == "stem"
                else _block(entry, style, heads=heads_for(entry.channels_out) if entry.attention else 0)
                for entry in encoder
            }
        )
        self.dec = nn.ModuleDict(
            {
                entry.name: _block(
                    entry, style, heads=heads_for(entry.channels_out) if entry.attention else 0
                )
                for entry in decoder
            }
        )
        self.out_norm = GroupNorm(channels[0], eps=1e-5)
        self.out_conv = Conv2d(channels[0], out_channels, 3, zero)

    def embed(self, c_noise: Tensor, labels: Tensor | None, augment_labels: Tensor | None) -> Tensor:
        h = self.map_noise(c_noise).to(self.map_layer0.weight.dtype)
        if self.map_augment is not None and augment_labels is not None:
            h = h + self.map_augment(augment_labels)
        h = self.map_layer1(silu(self.map_layer0(h)))
        if self.map_label is not None and labels is not None:
            h = h + self.map_label(_drop_labels(labels, self.label_dropout))
        return silu(h)

    def encode(self, x: Tensor, embedding: Tensor) -> list[Tensor]:
        features: list[Tensor] = []
        for name, layer in self.enc.items():
            features.append(layer(x) if name.endswith("_conv") else layer(features[-1], embedding))
        return features

    def read(self, h: Tensor) -> Tensor:
        return self.out_conv(silu(self.out_norm(h)))


def _block(entry: Entry, style: BlockStyle, *, heads: int) -> UNetBlock:
    resample = _RESAMPLE.get(entry.kind, "keep")
    return UNetBlock(entry.channels_in, entry.channels_out, style, resample=resample, heads=heads)


class EDMDenoiser(Denoiser):
    """A denoiser with EDM preconditioning around ``model``, a ``SongUNet`` or ``DhariwalUNet``.

    The constructor has the published options: those named here, and those of the network by keyword.
    ``use_fp16``, ``sigma_min`` and ``sigma_max`` are accepted and ignored: autocast or the dtype of the
    weights sets the precision, and the caller sets the noise levels.
    """

    backbone_name = "model"

    def __init__(
        self,
        img_resolution: int,
        img_channels: int,
        label_dim: int = 0,
        use_fp16: bool = False,
        sigma_min: float = 0.0,
        sigma_max: float = math.inf,
        sigma_data: float = 0.5,
        model_type: Literal["SongUNet", "DhariwalUNet"] = "DhariwalUNet",
        **model_kwargs: Any,
    ) -> None:
        super().__init__(img_resolution, img_channels, label_dim, sigma_data)
        _one_of("model_type", model_type, *EDM_MODELS)
        self.model = EDM_MODELS[model_type](
            img_resolution, img_channels, img_channels, label_dim=label_dim, **model_kwargs
        )


EDM_MODELS: dict[str, type[SongUNet] | type[DhariwalUNet]] = {
    "SongUNet": SongUNet,
    "DhariwalUNet": DhariwalUNet,
}
