"""DINOv2 (Oquab et al. 2023) for the Fréchet distance of Stein et al. 2023: images at 224 pixels, bicubic and
antialiased, ImageNet normalization, the class token after the last norm.

A vision transformer with layer scale. Weights have Meta's names (``dinov2_vitl14_pretrain.pth``) or those
of Hugging Face (``model.safetensors``); their shapes determine the size of the network.
"""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features.base import (
    Extractor,
    Names,
    cached_weights,
    fill,
    read_weights,
    resize_bicubic,
)

FILE = "dinov2_vitl14_pretrain.pth"
SOURCE = "dl.fbaipublicfiles.com/dinov2/dinov2_vitl14"
SIZE = 224
HEAD = 64
"""Channels per attention head, in every size of the network."""
OFFSET = 0.1
"""Added to the side of the position grid before the scale factor is computed, as in the original."""
FDD = (24, 1024)
"""Depth and width of ViT-L/14; only its distance has the name FDD."""


class _Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, width = x.shape
        q, k, v = self.qkv(x).reshape(b, t, 3, width // HEAD, HEAD).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, width))


class _MLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class _LayerScale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class _Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = _Attention(width)
        self.ls1 = _LayerScale(width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = _MLP(width, hidden)
        self.ls2 = _LayerScale(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.ls1(self.attn(self.norm1(x)))
        return x + self.ls2(self.mlp(self.norm2(x)))


class DinoV2(nn.Module):
    """Map uint8 RGB [b, 3, H, W] to the normalized class token [b, width]."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int, depth: int, hidden: int, patch: int, positions: int) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, positions, width))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, width, patch, patch)})
        self.blocks = nn.ModuleList(_Block(width, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        for name, values in (("mean", (0.485, 0.456, 0.406)), ("std", (0.229, 0.224, 0.225))):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, None]:
        x = (resize_bicubic(images, SIZE) / 255 - self.mean) / self.std
        x = self.patch_embed["proj"](x)
        side = x.shape[2]
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], 1)
        x = x + self._positions(side)
        for block in self.blocks:
            x = block(x)
        return self.norm(x[:, 0]), None

    def _positions(self, side: int) -> Tensor:
        """Position embeddings [1, 1 + side^2, width], interpolated from the training grid."""
        trained = math.isqrt(self.pos_embed.shape[1] - 1)
        if trained == side:
            return self.pos_embed
        grid = self.pos_embed[:, 1:].reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
        scale = (side + OFFSET) / trained
        grid = F.interpolate(grid, scale_factor=(scale, scale), mode="bicubic")
        return torch.cat([self.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)


def load_dinov2(weights: Path | None, shape: tuple[int, int, int]) -> Extractor:
    """Load the network from a file, or from a directory with one weight file."""
    path = weights or cached_weights(FILE, "dinov2", SOURCE)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix in (".safetensors", ".pth", ".bin"))
        if len(files) != 1:
            raise UserError(
                f"{path}: contains {len(files)} weight files; expected one; set --weights to a file"
            )
        path = files[0]
    state, sha256 = read_weights(path)
    state = _own_names(state)
    try:
        width, positions = state["cls_token"].shape[2], state["pos_embed"].shape[1]
        hidden, patch = state["blocks.0.mlp.fc1.weight"].shape[0], state["patch_embed.proj.weight"].shape[2]
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
    except (KeyError, IndexError, ValueError):
        raise UserError(f"{path}: not the weights of a DINOv2 network; expected size S, B or L") from None
    network = DinoV2(width, depth, hidden, patch, positions)
    fill(network, state, path)
    identity = {
        "name": "dinov2",
        "weights_sha256": sha256,
        "width": width,
        "depth": depth,
        "size": SIZE,
        "resize": "bicubic, antialiased",
    }
    names = Names("fdd") if (depth, width) == FDD else Names()
    return Extractor(network, width, identity, names=names)


_HUGGING_FACE = (
    (r"^(dinov2|model)\.", ""),
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^layernorm\.", "norm."),
    (r"^encoder\.layer\.", "blocks."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
)


def _own_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict to Meta's names and drop training-only tensors."""
    named: dict[str, Tensor] = {}
    for key, value in state.items():
        for pattern, replacement in _HUGGING_FACE:
            key = re.sub(pattern, replacement, key)
        named[key] = value
    for key in [key for key in named if key.endswith(".attention.attention.query.weight")]:
        block = key.removesuffix(".attention.attention.query.weight")
        for kind in ("weight", "bias"):
            parts = [
                named.pop(f"{block}.attention.attention.{w}.{kind}", None) for w in ("query", "key", "value")
            ]
            if all(part is not None for part in parts):
                named[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)  # type: ignore[arg-type]
    for unused in ("mask_token", "embeddings.mask_token"):
        named.pop(unused, None)
    return named
