"""What a data set is to the rest of the house: records with labels, in splits, and their scaling."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from diffratio_fast.data.sampler import batch_records
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.data.transfer import copied_ahead

if TYPE_CHECKING:
    from diffratio_fast.data.scaling import Vae


SPLITS = ("train", "validation", "test")


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
