"""The processes of a run: process group, sums, agreement.

The process group is created from torchrun's environment variables: Gloo for CPUs, NCCL for GPUs. Rank 0
writes all files and evaluates; the other ranks wait.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from diffratio_fast import launch
from diffratio_fast.errors import ReportedElsewhere, UserError
from diffratio_fast.training.processes.session import agree

STEP_TIMEOUT = timedelta(minutes=10)
"""Timeout of collectives in a step."""
MAIN_TIMEOUT = timedelta(hours=6)
"""Timeout while rank 0 works alone, for example in an evaluation."""

Result = TypeVar("Result")


@dataclass(frozen=True)
class World:
    """The processes of a run, from the view of one of them. A single process has no process group."""

    rank: int = 0
    size: int = 1
    control: dist.ProcessGroup | None = None
    """Gloo group, for waiting for rank 0."""

    @property
    def main(self) -> bool:
        """Whether this process writes files and prints (rank 0)."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum ``values`` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """Average ``values`` over the processes, in place."""
        return self.sum(values).div_(self.size) if self.size > 1 else values

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call ``function`` on rank 0 only and return its result on all ranks.

        If it raises, rank 0 reports the error and the other ranks end too.
        """
        if self.size == 1:
            return function()
        answer: list[tuple[bool, Result | None]] = [(False, None)]
        if not self.main:
            dist.broadcast_object_list(answer, 0, group=self.control)
            if not answer[0][0]:
                raise ReportedElsewhere
            return answer[0][1]  # type: ignore[return-value]
        try:
            answer = [(True, function())]
        finally:
            dist.broadcast_object_list(answer, 0, group=self.control)
        return answer[0][1]  # type: ignore[return-value]

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Context of independent work before a collective step: if processes fail, one reports its error."""
        error = None
        try:
            yield
        except UserError as caught:
            error = caught
        if self.size > 1:
            first = torch.tensor(self.size if error is None else self.rank)
            dist.all_reduce(first, dist.ReduceOp.MIN, group=self.control)
            if int(first) not in (self.size, self.rank):
                raise ReportedElsewhere
        if error is not None:
            raise error


ALONE = World()


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor (DTensor); other tensors unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


class Agreement:
    """Maximum of each flag over all processes, returned one call later so that no process waits.

    All processes get it in the same call and can act together. A single process gets it immediately.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self._pending: tuple[dist.Work, Tensor] | None = None

    def __call__(self, flags: Sequence[int]) -> list[int]:
        """Submit flags; return the maxima over the processes of the flags of the previous call."""
        if self.world.size == 1:
            return list(flags)
        agreed = self.close() or [0] * len(flags)
        values = torch.tensor(flags)
        work = dist.all_reduce(values, dist.ReduceOp.MAX, group=self.world.control, async_op=True)
        assert work is not None
        self._pending = work, values
        return agreed

    def close(self) -> list[int] | None:
        """Wait for the pending exchange and return its flags, if any."""
        if self._pending is None:
            return None
        work, values = self._pending
        self._pending = None
        work.wait()
        return values.tolist()


LOST = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|Timed out waiting|Socket|gloo|NCCL|store", re.IGNORECASE
)
"""Patterns of PyTorch's errors after another process has ended."""


def lost_others(error: RuntimeError) -> bool:
    """Whether an error of PyTorch means that another process has ended."""
    return isinstance(error, dist.DistError) or LOST.search(str(error)) is not None


def common_store(world: World) -> dist.Store | None:
    """A separate connection to the common store, for use by another thread; None for a single process.

    Entries of earlier processes of the launcher are not visible.
    """
    if world.size == 1:
        return None
    session = world.on_main(lambda: f"diffratio/{time.time_ns()}")
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return dist.PrefixStore(session, dist.TCPStore(address, port, None, False, wait_for_workers=False))


@contextlib.contextmanager
def joined(device: torch.device) -> Iterator[World]:
    """Context with the process group of the processes that torchrun started."""
    rank, size = launch.process()
    if size == 1:
        yield ALONE
        return
    if device.type == "cuda":
        _, here = launch.local_process()
        if here > torch.cuda.device_count():
            raise UserError(
                f"{here} processes for {torch.cuda.device_count()} GPUs; start one process per GPU "
                f"(--nproc-per-node {torch.cuda.device_count()})"
            )
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    try:
        shared, rank, size = next(dist.rendezvous("env://", timeout=STEP_TIMEOUT))
        store = dist.PrefixStore(agree(shared, rank, size, STEP_TIMEOUT), shared)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=STEP_TIMEOUT)
        control = dist.new_group(backend="gloo", timeout=MAIN_TIMEOUT)
        assert control is not None
        yield World(rank, size, control)
    except ReportedElsewhere:
        raise
    except UserError as error:
        raise UserError(f"process {rank}: {error}" if rank else str(error)) from None
    except RuntimeError as error:
        if not lost_others(error):
            raise
        reason = " ".join(str(error).split())
        raise UserError(
            f"process {rank} has lost the connection to the others ({reason[:200]}); see their messages"
        ) from error
    dist.destroy_process_group()
