"""Records as pictures: 8-bit conversion, grids, PNG."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from diffratio_fast.data.scaling import Scaling

TARGET_CELL = 48
"""Small images are enlarged by an integer factor to about this side length in pixels."""


def to_uint8(x0: Tensor, scaling: Scaling) -> Tensor:
    """Convert x0 [N, C, H, W] to uint8 [N, C, H, W]: the records' range on 0..255, rounded to nearest."""
    return records_to_uint8(scaling.to_records(x0.float().cpu()), scaling)


def records_to_uint8(records: Tensor, scaling: Scaling) -> Tensor:
    """Convert records [N, C, H, W] to uint8 [N, C, H, W], clipped and scaled as in ``to_uint8``."""
    if scaling.low is None or scaling.high is None:
        raise ValueError("latents have no pixel range; decode them first")
    if records.dtype == torch.uint8 and (scaling.low, scaling.high) == (0, 255):
        return records
    unit = (records.float().clamp(scaling.low, scaling.high) - scaling.low) / (scaling.high - scaling.low)
    return (unit * 255).round().to(torch.uint8)


def viewable(x0: Tensor, scaling: Scaling) -> Tensor:
    """Convert x0 [N, C, H, W] to uint8 pictures.

    Pixels use ``to_uint8``. Latents show their first three channels over ±3 standard deviations: only the
    VAE can decode them.
    """
    if scaling.low is not None:
        return to_uint8(x0, scaling)
    return ((x0[:, :3].float().cpu() / 3 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)


def grid(images: Tensor, columns: int, *, background: int = 24) -> npt.NDArray[np.uint8]:
    """Tile uint8 images [N, C, H, W] row by row into one picture [rows*cell, columns*cell, 3]."""
    count, channels, height, width = images.shape
    factor = max(1, round(TARGET_CELL / max(height, width)))
    gap = max(1, factor // 2)
    rows = -(-count // columns)
    canvas = np.full(
        (rows * (height * factor + gap) + gap, columns * (width * factor + gap) + gap, 3),
        background,
        np.uint8,
    )
    pixels = images.expand(count, 3, height, width) if channels == 1 else images[:, :3]
    enlarged = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3).permute(0, 2, 3, 1).numpy()
    for i, picture in enumerate(enlarged):
        top = gap + (i // columns) * (height * factor + gap)
        left = gap + (i % columns) * (width * factor + gap)
        canvas[top : top + height * factor, left : left + width * factor] = picture
    return canvas


def png(picture: npt.NDArray[np.uint8], *, quick: bool = False) -> bytes:
    """Encode a picture uint8 [H, W, 3] or [H, W] as PNG; ``quick`` needs a tenth of the time."""
    buffer = io.BytesIO()
    options = {"compress_level": 3} if quick else {"optimize": True}
    Image.fromarray(picture).save(buffer, "PNG", **options)
    return buffer.getvalue()
