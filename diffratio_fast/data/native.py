"""The native loader: threads read batches ahead into a ring of reused buffers.

A buffer returns to the ring when the last tensor that refers to it is deleted, so a caller may keep a
batch and its content never changes. For a GPU the ring is pinned, and a side stream copies each batch
while the previous one is used.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from diffratio_fast.data.records import Records
from diffratio_fast.data.sampler import Order
from diffratio_fast.data.transfer import Batch, copied_ahead

PIECE_BYTES = 1 << 20
"""Minimum bytes per piece; a batch is split into at most one piece per thread."""


@dataclass(frozen=True)
class Reading:
    """Reader settings: number of ``threads``, batches read ``ahead``, records to hash (``verify``)."""

    threads: int = 4
    ahead: int = 4
    verify: str = "first_epoch"

    def verifies(self, order: Order, batch: int, start: int) -> bool:
        """Whether ``batch`` is hashed; ``first_epoch`` hashes every record once, beginning at ``start``."""
        if self.verify == "first_epoch":
            return (batch - start) * order.batch_size < order.n
        return self.verify == "always"


class Ring:
    """A pool of buffers of ``nbytes`` bytes; a buffer is reused when nothing refers to its last array."""

    def __init__(self, nbytes: int, *, pinned: bool = False) -> None:
        self._nbytes, self._pinned = nbytes, pinned
        self._free: deque[np.ndarray] = deque()
        self.allocated = 0

    def acquire(self) -> np.ndarray:
        """Acquire an array uint8 (nbytes,) with undefined content that has no other user."""
        try:
            owner = self._free.popleft()
        except IndexError:
            owner = torch.empty(self._nbytes, dtype=torch.uint8, pin_memory=self._pinned).numpy()
            self.allocated += 1
        array = np.frombuffer(
            owner.data, np.uint8
        )  # a new base object: views of it keep it alive, not `owner`
        weakref.finalize(array, self._free.append, owner).atexit = False
        return array


class ReadAhead:
    """Batches of an order as NumPy arrays, read ahead of their use.

    ``read(k)`` is a pure function of ``k``. Reading k also starts the reads of the following batches.
    """

    def __init__(
        self, records: Records, order: Order, start: int, reading: Reading, *, pinned: bool = False
    ) -> None:
        self._records, self._order, self._start, self._reading = records, order, start, reading
        self.ring = Ring(order.local * records.record_bytes, pinned=pinned)
        self._pool = ThreadPoolExecutor(reading.threads, thread_name_prefix="diffratio-data")
        self._pending: dict[int, _Pending] = {}
        self._epoch = -1

    def read(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Records [b, C, H, W] in the stored dtype and labels int64 (b,) of ``batch``; b = 0 past the end."""
        for stale in [k for k in self._pending if not batch <= k <= batch + self._reading.ahead]:
            del self._pending[stale]
        end = self._order.batches
        for k in range(batch, batch + self._reading.ahead + 1):
            if k not in self._pending and (k == batch or end is None or k < end):
                self._pending[k] = self._begin(k)
        return self._pending.pop(batch).result()

    def _begin(self, batch: int) -> _Pending:
        records, order = self._records, self._order
        epoch = order.epoch(batch)
        rows = order.rows(batch)
        if epoch != self._epoch:  # draw the order of the next epoch while this one is read
            self._epoch = epoch
            self._pool.submit(order.prepare_epoch, epoch + 1)
        buffer = self.ring.acquire()[: len(rows) * records.record_bytes].reshape(
            len(rows), records.record_bytes
        )
        verify = self._reading.verifies(order, batch, self._start)
        pieces = max(1, min(self._reading.threads, buffer.nbytes // PIECE_BYTES))
        cuts = [len(rows) * i // pieces for i in range(pieces + 1)]
        work = [
            self._pool.submit(records.gather, rows[a:b], buffer[a:b], verify=verify)
            for a, b in pairwise(cuts)
        ]
        manifest = records.manifest
        # The ring requires that no other view of the batch is kept.
        shaped = buffer.reshape(-1).view(manifest.dtype).reshape(len(rows), *manifest.shape)
        return _Pending(work, shaped, records.labels[rows])

    def close(self) -> None:
        """Stop reading and wait for the reads in progress."""
        self._pending.clear()
        self._pool.shutdown(wait=True, cancel_futures=True)


@dataclass
class _Pending:
    work: list[Future[None]]
    records: np.ndarray
    labels: np.ndarray

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        for piece in self.work:
            piece.result()
        return self.records, self.labels


def native_batches(
    records: Records, order: Order, start: int, reading: Reading, device: torch.device
) -> Iterator[Batch]:
    """(records [b, C, H, W], labels int64 (b,)) on ``device``, starting at batch number ``start``."""
    source = ReadAhead(records, order, start, reading, pinned=device.type == "cuda")
    try:
        batches = _on_cpu(source, order, start)
        yield from batches if device.type == "cpu" else copied_ahead(batches, device)
    finally:
        source.close()


def _on_cpu(source: ReadAhead, order: Order, start: int) -> Iterator[Batch]:
    batch, end = start, order.batches
    while end is None or batch < end:
        read, labels = source.read(batch)
        yield torch.from_numpy(read), torch.from_numpy(np.ascontiguousarray(labels))
        del read, labels  # otherwise this frame keeps the buffer until the next iteration
        batch += 1
