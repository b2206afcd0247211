"""A prepared data set: a directory of fixed-record shards behind the ``DataSet`` interface."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from diffratio_fast.data.manifest import read_manifest
from diffratio_fast.data.native import Batch, Reading, native_batches
from diffratio_fast.data.records import Records
from diffratio_fast.data.sampler import Order
from diffratio_fast.errors import UserError

LOADERS = ("native", "dali")
VERIFY = ("always", "first_epoch", "never")


class ShardDataSet:
    """Records of a prepared data set; satisfies ``DataSet``.

    ``kind`` is ``image`` (uint8 pixels) or ``latent_moments`` (float16 mean ‖ standard deviation, twice the
    channels of the latent; the caller draws z = mean + std · ε). ``shape`` is the shape of a record.
    ``scaling`` applies to pixels, or to latents z.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        loader: str = "native",
        verify: str = "first_epoch",
        device: torch.device | str = "cpu",
        threads: int | None = None,
        ahead: int = 4,
        block: int = 1,
    ) -> None:
        """Open ``directory``; raises ``UserError`` if a file is missing or does not match the manifest.

        ``loader`` is one of ``LOADERS`` (all give the same batches). ``verify`` is one of ``VERIFY`` and
        selects the records that are hashed when read. ``device`` is the device of the batches, ``ahead``
        the number of batches read ahead. ``block`` > 1 shuffles blocks of that many consecutive records
        instead of single records, for disks with slow seeks.
        """
        for option, value, allowed in (("loader", loader, LOADERS), ("verify", verify, VERIFY)):
            if value not in allowed:
                raise UserError(f"{option} {value!r}: unknown; expected one of {', '.join(allowed)}")
        if block < 1 or ahead < 1 or (threads is not None and threads < 1):
            raise UserError("block, ahead and threads must be at least 1")
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        self._records = Records(self.directory, self.manifest)
        self._loader, self._device, self._block = loader, torch.device(device), block
        self._reading = Reading(threads or min(8, max(4, os.cpu_count() or 1)), ahead, verify)
        self.name = self.manifest.name
        self.kind = self.manifest.kind
        self.shape = self.manifest.shape
        self.class_names = self.manifest.class_names
        self.scaling = self.manifest.scaling
        self.vae = self.manifest.vae

    def count(self, split: str) -> int:
        """Number of records in a split."""
        first, end = self._range(split)
        return end - first

    def batches(
        self,
        split: str,
        batch_size: int,
        *,
        seed: int,
        start: int = 0,
        rank: int = 0,
        world_size: int = 1,
        epochs: int | None = None,
    ) -> Iterator[Batch]:
        """Iterate over (records [b, C, H, W] in the stored dtype, labels int64 (b,)) from batch ``start``.

        ``batch_size`` is global; this rank gets its slice of ``batch_size / world_size``. Batches continue
        across epochs: without end, or for ``epochs`` epochs. The last batch of a finite sequence may be
        short (empty on some ranks); every rank gets the same number of batches. Batch b begins at
        (epoch, record) = divmod(b · batch_size, count) for any world size.
        """
        first, end = self._range(split)
        if end == first:
            raise UserError(
                f"{self.directory}: the {split} split is empty; prepare the data set with --{split}"
            )
        if batch_size < 1 or batch_size % world_size:
            raise UserError(
                f"batch size {batch_size} is not a multiple of the {world_size} processes; expected a "
                "multiple"
            )
        order = Order(seed, batch_size, end - first, first, rank, world_size, epochs, self._block)
        if self._loader == "dali":
            from diffratio_fast.data.dali import dali_batches

            return dali_batches(self._records, order, start, self._reading, self._device)
        return native_batches(self._records, order, start, self._reading, self._device)

    def first(self, split: str, count: int) -> Batch:
        """The first ``count`` records of a split in stored order, or all if it has fewer."""
        return self.part(split, 0, count)

    def part(self, split: str, start: int, end: int) -> Batch:
        """Records ``start`` to ``end - 1`` of a split in stored order, clipped to the split."""
        first, last = self._range(split)
        return self.read(np.arange(min(first + start, last), min(first + end, last)))

    def read(self, rows: np.ndarray) -> Batch:
        """Records [b, C, H, W] and labels int64 (b,) of ``rows`` int64 (b,), on the CPU, verified."""
        buffer = np.empty((len(rows), self.manifest.record_bytes), np.uint8)
        self._records.gather(rows, buffer, verify=self._reading.verify != "never")
        records = buffer.reshape(-1).view(self.manifest.dtype).reshape(len(rows), *self.shape)
        return torch.from_numpy(records), torch.from_numpy(np.ascontiguousarray(self._records.labels[rows]))

    def labels(self, first: int, end: int) -> np.ndarray:
        """Labels int64 (end - first,) of a range of rows."""
        return np.array(self._records.labels[first:end])

    def _range(self, split: str) -> tuple[int, int]:
        if split not in self.manifest.splits:
            raise UserError(
                f"{self.directory}: no split {split!r}; expected one of {', '.join(self.manifest.splits)}"
            )
        return self.manifest.splits[split]
