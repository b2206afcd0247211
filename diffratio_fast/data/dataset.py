"""The data-set interface: labeled records in splits, and their scaling."""

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
    """Records of one shape with integer labels, divided into fixed ``SPLITS``."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str:
        """Kind of a record: "image" or "latent_moments" (mean ‖ standard deviation)."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def class_names(self) -> tuple[str, ...]: ...

    @property
    def scaling(self) -> Scaling: ...

    @property
    def vae(self) -> Vae | None:
        """The autoencoder that decodes the latents; None for images."""
        ...

    def count(self, split: str) -> int:
        """Number of records in a split."""
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
        """Infinite iterator of (records [b, C, H, W], labels int64 [b]), starting at batch number ``start``.

        ``batch_size`` is global; this rank gets its slice of ``batch_size / world_size``.
        """
        ...

    def first(self, split: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The first ``count`` records of a split in stored order, or all if it has fewer."""
        ...

    def part(self, split: str, start: int, end: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Records ``start`` to ``end - 1`` of a split in stored order, clipped to the split."""
        ...


@dataclass(frozen=True)
class InMemoryDataSet:
    """A data set in memory: per split, records [N, C, H, W] and labels int64 [N]."""

    name: str
    class_names: tuple[str, ...]
    scaling: Scaling
    splits: dict[str, tuple[torch.Tensor, torch.Tensor]]
    kind: str = "image"
    vae: Vae | None = None
    device: torch.device | None = None
    """The device of the batches; None and the CPU leave them on the host."""

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
    """A data set with all labels set to 0, for unconditional training."""

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
    """Shape of x0: the shape of a record; for latents with half the channels of the record."""
    channels, height, width = data.shape
    return (channels // 2 if data.kind == "latent_moments" else channels), height, width
