"""What a data set is to the rest of the house: records with labels, in splits, and their scaling."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from diffratio_fast import ops
from diffratio_fast.data.sampler import batch_records
from diffratio_fast.data.transfer import copied_ahead
from diffratio_fast.untrusted import DAMAGE, one_line

if TYPE_CHECKING:
    from diffratio_fast.data.manifest import Vae

SIGMA_DATA = 0.5
"""Standard deviation of scaled data; every noise level and weight is relative to it."""

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Scaling:
    """The affine map between records (pixels, latents) and the model's x0, whose std is ``SIGMA_DATA``.

    ``mean`` and ``std`` are those of the records, a number per channel (or one for all); ``low`` and
    ``high`` bound the records' values, or are None where they have no bounds (latents).
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    low: float | None = None
    high: float | None = None

    @classmethod
    def parse(cls, values: Any) -> Scaling:
        """The scaling that a mapping of plain data describes; ``ValueError`` where it is none."""
        try:
            mean, std = (tuple(float(number) for number in values[name]) for name in ("mean", "std"))
            low, high = (None if values[name] is None else float(values[name]) for name in ("low", "high"))
        except DAMAGE as error:
            raise ValueError(f"no scaling of data ({one_line(error)})") from None
        finite = all(math.isfinite(number) for number in (*mean, *std, low or 0.0, high or 0.0))
        if not (finite and mean and len(mean) == len(std) and min(std) > 0):
            raise ValueError("scaling needs as many means as positive std, all finite")
        if (low is None) != (high is None) or (low is not None and high is not None and not low < high):
            raise ValueError("scaling needs bounds low < high, or none")
        return cls(mean, std, low, high)

    def _affine(self, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        dtype = like.dtype if like.is_floating_point() else torch.float32
        if type(like) is not torch.Tensor:  # one without numbers, of a plan
            return _affine.__wrapped__(self, like.dim(), like.device, dtype)
        return _affine(self, like.dim(), like.device, dtype)

    def to_model(self, records: torch.Tensor) -> torch.Tensor:
        """Records [B, C, ...] of any dtype to x0, floating point (float32 from integers)."""
        mean, factor = self._affine(records)
        return (records.to(mean.dtype) - mean) * factor

    def to_records(self, x0: torch.Tensor) -> torch.Tensor:
        """x0 [B, C, ...] to the records' units, floating point, neither clipped nor rounded."""
        mean, factor = self._affine(x0)
        return x0 / factor + mean

    def bounds(self) -> tuple[list[float], list[float]] | None:
        """Lower and upper bound of x0 per channel, as ``to_model`` rounds them; None where there are none."""
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
    """Mean and factor; kept, because a copy from the host each time would make it wait for a GPU."""
    shape = (1, -1) + (1,) * (dimensions - 2)
    mean = torch.tensor(scaling.mean, dtype=torch.float64).reshape(shape)
    factor = SIGMA_DATA / torch.tensor(scaling.std, dtype=torch.float64).reshape(shape)
    return mean.to(device, dtype), factor.to(device, dtype)


class DataSet(Protocol):
    """Records of one shape with integer labels, cut into ``SPLITS`` once and for all."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """What a record is: "image", or "latent_moments" (mean ‖ standard deviation)."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def scaling(self) -> Scaling: ...

    @property
    def vae(self) -> Vae | None:
        """What latents are decoded with; None for images."""
        ...

    def count(self, split: str) -> int:
        """Records in a split."""
        ...

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Endless (records [b, C, H, W], labels int64 [b]), where wanted, from batch number ``start``.

        ``batch_size`` is global; this rank gets its slice of ``batch_size / world_size``.
        """
        ...

    def first(self, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` records of a split in stored order (all, where it has fewer)."""
        ...

    def part(self, split: str, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records ``start`` to ``end - 1`` of a split in stored order (those that there are)."""
        ...


@dataclass(frozen=True)
class InMemoryDataSet:
    """A data set small enough to live in memory: per split, records [N, C, H, W] and labels int64 [N]."""

    name: str
    class_names: tuple[str, ...]
    scaling: Scaling
    splits: dict[str, tuple[torch.Tensor, torch.Tensor]]
    kind: str = "image"
    vae: Vae | None = None
    device: torch.device | None = None
    """The GPU that batches go to; they stay on the host where it is None, or the CPU."""

    @property
    def shape(self) -> tuple[int, int, int]:
        channels, height, width = self.splits["train"][0].shape[1:]
        return channels, height, width

    def count(self, split: str) -> int:
        return len(self.splits[split][1])

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        records, labels = self.splits[split]
        chosen = (
            torch.from_numpy(
                batch_records(seed, batch, batch_size, len(labels), rank=rank, world_size=world_size)
            )
            for batch in itertools.count(start)
        )
        batches = ((records[rows], labels[rows]) for rows in chosen)
        if self.device is None or self.device.type == "cpu":
            return batches
        return copied_ahead(batches, self.device)

    def first(self, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.part(split, 0, count)

    def part(self, split: str, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        records, labels = self.splits[split]
        return records[start:end], labels[start:end]


class OneClass:
    """A data set whose records are all of one class: what unconditional training sees."""

    class_names = ("all",)

    def __init__(self, data: DataSet) -> None:
        self.data = data
        self.name, self.kind, self.shape, self.scaling = data.name, data.kind, data.shape, data.scaling
        self.vae = data.vae

    def count(self, split: str) -> int:
        return self.data.count(split)

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        source = self.data.batches(
            split, batch_size, seed=seed, start=start, rank=rank, world_size=world_size
        )
        for records, labels in source:
            yield records, torch.zeros_like(labels)

    def first(self, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.part(split, 0, count)

    def part(self, split: str, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        records, labels = self.data.part(split, start, end)
        return records, torch.zeros_like(labels)


def model_shape(data: DataSet) -> tuple[int, int, int]:
    """The shape of x0: a record's, or a latent's, which has half its record's channels."""
    channels, height, width = data.shape
    return (channels // 2 if data.kind == "latent_moments" else channels), height, width


def to_model(
    scaling: Scaling,
    records: torch.Tensor,
    rng: torch.Tensor,
    index: torch.Tensor,
    *,
    substep: int = 0,
    draw: int = 0,
) -> torch.Tensor:
    """Records [B, ...] of sample indices [B] as x0, float32: pixels scaled, latents drawn and scaled.

    Records of floating point are moments, mean ‖ standard deviation: z = mean + std eps with eps of the noise
    contract (purpose ``POSTERIOR``).
    """
    if not records.is_floating_point():
        return scaling.to_model(records)
    mean, std = records.float().chunk(2, dim=1)
    noise = ops.normal(rng, index, mean.shape[1:], ops.Purpose.POSTERIOR, substep=substep, draw=draw)
    return scaling.to_model(mean + std * noise)
