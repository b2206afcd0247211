"""Records as pictures: 8-bit conversion, grids, PNG."""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffratio_fast.data.scaling import Scaling

TARGET_CELL = 48
"""Small images are enlarged by an integer factor to about this side length in pixels."""
LABEL_SIZE, LABEL_GAP, LABEL_LENGTH = 13, 5, 16
"""Height of a label and the space around it, in pixels; its length, in characters."""


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


def grid(images: Tensor, columns: int, *, labels: Sequence[str] = ()) -> npt.NDArray[np.uint8]:
    """Tile uint8 images [N, C, H, W] row by row into one picture [rows*cell, labels + columns*cell, 3].

    Gaps are white. ``labels`` are written before the rows, one for each.
    """
    count, channels, height, width = images.shape
    factor = max(1, round(TARGET_CELL / max(height, width)))
    gap = max(1, factor // 2)
    rows = -(-count // columns)
    cell = height * factor + gap
    margin = _label_width(labels) if labels else 0
    shape = (rows * cell + gap, margin + columns * (width * factor + gap) + gap, 3)
    canvas = np.full(shape, 255, np.uint8)
    pixels = images.expand(count, 3, height, width) if channels == 1 else images[:, :3]
    enlarged = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3).permute(0, 2, 3, 1).numpy()
    for i, picture in enumerate(enlarged):
        top = gap + (i // columns) * cell
        left = margin + gap + (i % columns) * (width * factor + gap)
        canvas[top : top + height * factor, left : left + width * factor] = picture
    if not labels:
        return canvas
    drawn = Image.fromarray(canvas)
    pen = ImageDraw.Draw(drawn)
    for row, text in enumerate(labels):
        place = (margin - LABEL_GAP, gap + row * cell + height * factor / 2)
        pen.text(place, _shortened(text), fill=(60, 60, 60), anchor="rm", font=_font())
    return np.asarray(drawn)


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(LABEL_SIZE)


def _shortened(text: str) -> str:
    return text if len(text) <= LABEL_LENGTH else text[: LABEL_LENGTH - 1] + "…"


def _label_width(labels: Sequence[str]) -> int:
    return round(max(_font().getlength(_shortened(text)) for text in labels)) + 2 * LABEL_GAP


def png(picture: npt.NDArray[np.uint8], *, quick: bool = False) -> bytes:
    """Encode a picture uint8 [H, W, 3] or [H, W] as PNG; ``quick`` needs a tenth of the time."""
    buffer = io.BytesIO()
    options = {"compress_level": 3} if quick else {"optimize": True}
    Image.fromarray(picture).save(buffer, "PNG", **options)
    return buffer.getvalue()
