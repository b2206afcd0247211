"""The order of records: a pure function of (seed, epoch), sliced by rank.

A training run reads one infinite sequence of positions, ``position = batch * batch_size + i``. Position p
is record ``permutation(seed, p // n)[p % n]``. A run therefore resumes from a batch number alone, at any
world size, and an epoch contains every record exactly once. A finite sequence is the first ``epochs * n``
positions; its last batch may be short.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from diffratio_fast import ops


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int, block: int = 1) -> np.ndarray:
    """A uniformly random permutation of ``n`` records: int64 (n,), the same on every machine.

    Records are sorted by 64-bit random keys (purpose ``DATA_ORDER``, epoch as the step, record number as
    the sample index); ties keep the record order. With ``block`` > 1, blocks of that many consecutive
    records are permuted instead, and each block is read in one request.
    """
    blocks = -(-n // block)
    words = ops.random_words(
        ops.make_rng(seed, epoch), torch.arange(blocks, dtype=torch.int64), ops.Purpose.DATA_ORDER, 2
    ).numpy()
    keys = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1].astype(np.uint64)
    order = np.argsort(keys, kind="stable")
    if block > 1:
        order = (order[:, None] * block + np.arange(block)).reshape(-1)
        order = order[order < n]
    order.setflags(write=False)
    return order


def batch_records(
    seed: int,
    batch: int,
    batch_size: int,
    n: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    epochs: int | None = None,
    block: int = 1,
) -> np.ndarray:
    """Records of this rank's slice of global batch number ``batch``: int64 (batch_size / world_size,).

    ``batch_size`` is the global batch size, a multiple of ``world_size``. Batches continue across epochs.
    With ``epochs`` the sequence is finite: the slice of the last batch may be shorter, or empty.
    """
    if batch_size % world_size:
        raise ValueError(f"batch size {batch_size} is not a multiple of {world_size} processes")
    local = batch_size // world_size
    positions = batch * batch_size + rank * local + np.arange(local, dtype=np.int64)
    if epochs is not None:
        positions = positions[positions < epochs * n]
    records = np.empty(len(positions), np.int64)
    if not len(positions):
        return records
    for epoch in range(int(positions[0] // n), int(positions[-1] // n) + 1):
        inside = positions // n == epoch
        records[inside] = permutation(seed, epoch, n, block)[positions[inside] % n]
    return records


@dataclass(frozen=True)
class Order:
    """One rank's slice of the sequence over ``n`` records, the first of them at row ``first``."""

    seed: int
    batch_size: int
    n: int
    first: int = 0
    rank: int = 0
    world_size: int = 1
    epochs: int | None = None
    block: int = 1

    @property
    def local(self) -> int:
        """Number of this rank's records in a full batch."""
        return self.batch_size // self.world_size

    @property
    def batches(self) -> int | None:
        """Number of batches (the same on every rank), or None if the sequence is infinite."""
        return None if self.epochs is None else -(-self.epochs * self.n // self.batch_size)

    def rows(self, batch: int) -> np.ndarray:
        """Rows of this rank's slice of ``batch``: int64 (b,)."""
        return self.first + batch_records(
            self.seed,
            batch,
            self.batch_size,
            self.n,
            rank=self.rank,
            world_size=self.world_size,
            epochs=self.epochs,
            block=self.block,
        )

    def epoch(self, batch: int) -> int:
        """The epoch in which ``batch`` begins."""
        return batch * self.batch_size // self.n

    def prepare_epoch(self, epoch: int) -> None:
        """Draw the order of an epoch before its first batch is read."""
        if self.epochs is None or epoch < self.epochs:
            permutation(self.seed, epoch, self.n, self.block)
