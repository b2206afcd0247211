"""Scaling between stored records and model values."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from diffratio_fast import ops
from diffratio_fast.storage.reading import DAMAGE, one_line

SIGMA_DATA = 0.5
"""Standard deviation of scaled data; every noise level and weight is relative to it."""


@dataclass(frozen=True)
class Scaling:
    """The affine map between records (pixels, latents) and the model's x0, whose std is ``SIGMA_DATA``.

    ``mean`` and ``std`` are those of the records: one number per channel, or one for all channels. ``low``
    and ``high`` bound the record values; both are None for unbounded records (latents).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    @classmethod
    def parse(cls, values: Any) -> Scaling:
        """Parse a mapping of plain data; raises ``ValueError`` if it is not a valid scaling."""
        try:
            mean, std = (tuple(float(number) for number in values[name]) for name in ("mean", "std"))
            low, high = (None if values[name] is None else float(values[name]) for name in ("low", "high"))
        except DAMAGE as error:
            raise ValueError(f"not a data scaling ({one_line(error)})") from None
        finite = all(math.isfinite(number) for number in (*mean, *std, low or 0.0, high or 0.0))
        if not (finite and mean and len(mean) == len(std) and min(std) > 0):
            raise ValueError("scaling needs one positive std for each mean, all finite")
        if (low is None) != (high is None) or (low is not None and high is not None and not low < high):
            raise ValueError("scaling needs bounds low < high, or no bounds")
        return cls(mean, std, low, high)

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        if type(like) is not torch.Tensor:  # a fake tensor of a plan must not enter the cache
            return _affine.__wrapped__(self, like.dim(), like.device, dtype)
        return _affine(self, like.dim(), like.device, dtype)

    def to_model(self, records: torch.Tensor) -> torch.Tensor:
        """Convert records [B, C, ...] of any dtype to x0, floating point (float32 from integers)."""
        mean, factor = self._affine(records)
        return (records.to(mean.dtype) - mean) * factor

    def to_records(self, x0: torch.Tensor) -> torch.Tensor:
        """Convert x0 [B, C, ...] to the records' units, floating point, neither clipped nor rounded."""
        mean, factor = self._affine(x0)
        return x0 / factor + mean

    def bounds(self) -> tuple[list[float], list[float]] | None:
        """Lower and upper bounds of x0 per channel, rounded as in ``to_model``; None if unbounded."""
        if self.low is None or self.high is None:
            return None
        mean = np.array(self.mean, np.float32)
        factor = (SIGMA_DATA / np.array(self.std)).astype(np.float32)
        low, high = ((np.float32(value) - mean) * factor for value in (self.low, self.high))
        return low.tolist(), high.tolist()


@functools.lru_cache(maxsize=64)
def _affine(
    scaling: Scaling, dimensions: int, device: torch.device, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and factor on the device; cached, because a copy from the host in each call synchronizes."""
    shape = (1, -1) + (1,) * (dimensions - 2)
    mean = torch.tensor(scaling.mean, dtype=torch.float64).reshape(shape)
    factor = SIGMA_DATA / torch.tensor(scaling.std, dtype=torch.float64).reshape(shape)
    return mean.to(device, dtype), factor.to(device, dtype)


def to_model(
    scaling: Scaling,
    records: torch.Tensor,
    rng: torch.Tensor,
    index: torch.Tensor,
    *,
    substep: int = 0,
    draw: int = 0,
) -> torch.Tensor:
    """Convert records [B, ...] with sample indices [B] to x0, float32.

    Integer records are pixels and are scaled. Floating-point records are moments, mean ‖ standard
    deviation: z = mean + std eps is drawn with eps of purpose ``POSTERIOR`` and scaled.
    """
    if not records.is_floating_point():
        return scaling.to_model(records)
    mean, std = records.float().chunk(2, dim=1)
    noise = ops.normal(rng, index, mean.shape[1:], ops.Purpose.POSTERIOR, substep=substep, draw=draw)
    return scaling.to_model(mean + std * noise)


SD_VAE = "stabilityai/sd-vae-ft-mse"


LATENT_SCALINGS = {SD_VAE: Scaling((5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28))}
"""Published scalings of latents by VAE; latents of other VAEs use measured statistics."""


@dataclass(frozen=True)
class Vae:
    """The autoencoder of the latents: its published name, and the sha256 of its weights ("" if unknown)."""

    name: str
    sha256: str = ""


EDM_PIXELS = Scaling((127.5,), (63.75,), 0, 255)
"""Pixels to [-1, 1], the input range of published EDM networks."""
