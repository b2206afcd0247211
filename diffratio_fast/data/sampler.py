"""The order of records: a pure function of (seed, epoch), sliced by rank.

A training run sees one endless sequence of positions, ``position = batch * batch_size + i``; position p
is record ``permutation(seed, p // n)[p % n]``. So a run resumes from a batch number alone, at any world
size, and an epoch visits every record exactly once.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch

from diffratio_fast import ops


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, n: int) -> np.ndarray:
    """A uniformly random order of ``n`` records: int64 (n,), the same on every machine.

    Records are sorted by 64-bit keys drawn from the noise contract (purpose ``DATA_ORDER``, the epoch in
    the place of the step, the record as the sample index); ties keep the record order.
    """
    words = ops.random_words(
        ops.make_rng(seed, epoch), torch.arange(n, dtype=torch.int64), ops.Purpose.DATA_ORDER, 2
    ).numpy()
    keys = (words[:, 0].astype(np.uint64) << np.uint64(32)) | words[:, 1].astype(np.uint64)
    order = np.argsort(keys, kind="stable")
    order.setflags(write=False)
    return order


def batch_records(
    seed: int, batch: int, batch_size: int, n: int, *, rank: int = 0, world_size: int = 1
) -> np.ndarray:
    """Records of this rank's slice of global batch number ``batch``: int64 (batch_size / world_size,).

    ``batch_size`` is the global batch and a multiple of ``world_size``; batches run on across epochs.
    """
    if batch_size % world_size:
        raise ValueError(f"batch size {batch_size} is not a multiple of {world_size} processes")
    local = batch_size // world_size
    positions = batch * batch_size + rank * local + np.arange(local, dtype=np.int64)
    records = np.empty(local, np.int64)
    for epoch in range(int(positions[0] // n), int(positions[-1] // n) + 1):
        inside = positions // n == epoch
        records[inside] = permutation(seed, epoch, n)[positions[inside] % n]
    return records
