"""Shapes and argument checks of the ratio operations, shared by the public functions and the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.ops import noise_checks

NAMES = ("patch", "position", "mix", "mix_bias", "up", "down", "head", "energy")
"""The weights of a RatioMixer in order (``weight_shapes``); the last exists only with an energy head."""

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


class Layout(NamedTuple):
    """Sizes of a RatioMixer and of its images; a patch is ``size`` x ``size`` pixels."""

    channels: int
    image_height: int
    image_width: int
    size: int
    tokens: int
    width: int
    depth: int
    hidden: int
    energy: bool = False

    @property
    def conditioning(self) -> int:
        """D: the token bias and the hidden bias of every layer."""
        return self.width + self.depth * self.hidden


def weight_shapes(
    tokens: int, width: int, depth: int, hidden: int, patch: int, energy: bool = False
) -> dict[str, tuple[int, ...]]:
    """Shapes by name, in the order of the ``weights`` argument; ``patch``: numbers per patch."""
    shapes: dict[str, tuple[int, ...]] = {
        "patch": (width, patch),
        "position": (tokens, width),
        "mix": (depth, tokens, tokens),
        "mix_bias": (depth, tokens),
        "up": (depth, hidden, width),
        "down": (depth, width, hidden),
        "head": (tokens, width),
    }
    return shapes | {"energy": (width, patch)} if energy else shapes


def layout(weights: Sequence[Tensor], images: Tensor) -> Layout:
    """The sizes of weights and images [B, channels, H, W]; ``ValueError`` if they do not match."""
    energy = len(weights) == len(NAMES)
    if not energy and len(weights) != len(NAMES) - 1:
        names = ", ".join(NAMES[:-1])
        raise ValueError(f"weights must be the 7 tensors {names}, or 8 with energy, got {len(weights)}")
    if images.dim() != 4:
        raise ValueError(f"images must be [B, channels, H, W], got {list(images.shape)}")
    if weights[0].dim() != 2 or weights[1].dim() != 2 or weights[4].dim() != 3:
        raise ValueError("weights patch and position must be matrices, up a stack of matrices")
    if weights[0].numel() == 0 or weights[1].numel() == 0 or weights[4].numel() == 0:
        raise ValueError("weights must not be empty")
    (width, patch), (tokens, _), (depth, hidden, _) = weights[0].shape, weights[1].shape, weights[4].shape
    for (name, shape), weight in zip(
        weight_shapes(tokens, width, depth, hidden, patch, energy).items(), weights, strict=True
    ):
        if tuple(weight.shape) != shape:
            raise ValueError(f"weight {name} must be {list(shape)}, got {list(weight.shape)}")
        if weight.dtype != weights[0].dtype or weight.dtype not in DTYPES:
            raise TypeError(f"weights must all be float32, bfloat16 or float64, {name} is {weight.dtype}")
        noise_checks.same_device(f"weight {name}", weight, "the image tensor", images)
    if images.dtype not in DTYPES:
        raise TypeError(f"images must be float32, bfloat16 or float64, got {images.dtype}")
    if (images.dtype == torch.float64) != (weights[0].dtype == torch.float64):
        raise TypeError(f"float64 images go with float64 weights: {images.dtype} and {weights[0].dtype}")
    _, channels, image_height, image_width = images.shape
    size = math.isqrt(max(patch // max(channels, 1), 1))
    fits = channels * size * size == patch and image_height % size == 0 and image_width % size == 0
    if not fits or (image_height // size) * (image_width // size) != tokens:
        raise ValueError(
            f"weights for {tokens} patches of {patch} numbers do not fit images {list(images.shape[1:])}"
        )
    return Layout(channels, image_height, image_width, size, tokens, width, depth, hidden, energy)


def compute_type(images: Tensor) -> torch.dtype:
    return torch.float64 if images.dtype == torch.float64 else torch.float32


def column(name: str, value: Tensor, shape: tuple[int, ...], images: Tensor) -> Tensor:
    """Check a floating-point tensor (shape, device of the images); return it in the compute dtype."""
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must be {list(shape)}, got {list(value.shape)}")
    if not value.dtype.is_floating_point:
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    noise_checks.same_device(name, value, "the image tensor", images)
    return value.to(compute_type(images))


def level(name: str, value: Tensor, shape: tuple[int, ...], images: Tensor) -> Tensor:
    """``column`` for a non-differentiable tensor; on the CPU NaN raises ``ValueError``."""
    if value.requires_grad:
        raise ValueError(f"not differentiable in {name}: detach it")
    value = column(name, value, shape, images)
    if value.device.type == "cpu" and not torch.compiler.is_compiling() and bool(value.isnan().any()):
        raise ValueError(f"{name} contains NaN")
    return value


def stream(images: Tensor, rng: Tensor, index: Tensor, purposes: Sequence[int], substep: int) -> None:
    noise_checks.stream(rng, index, purposes, substep, 0)
    noise_checks.same_device("index", index, "the image tensor", images)
    if index.shape[0] != images.shape[0]:
        raise ValueError(f"index must have one entry per sample: {index.shape[0]} for {images.shape[0]}")


def divergence_code(name: str) -> int:
    """The position of the divergence in the table; ``ValueError`` for an unknown name."""
    if name not in DIVERGENCES:
        raise ValueError(f"divergence must be one of {', '.join(DIVERGENCES)}, not {name!r}")
    return list(DIVERGENCES).index(name)
