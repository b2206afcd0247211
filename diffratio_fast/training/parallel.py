"""Data-parallel training of one network, by PyTorch's own engine (DDP).

Each process takes its slice of a batch; gradients are averaged over the processes while the backward pass
runs. A step's numbers are those of one process but for the order of sums: random numbers belong to a sample's
index in the whole batch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffratio_fast.config import RunConfig
from diffratio_fast.training.distributed import World


class Objective(nn.Module):
    """What is computed of a network in a training pass, as a module whose forward pass can be watched."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(*arguments, **keywords)


class Parallel:
    """``function`` of a network's weights, called for training; its gradients are means over processes."""

    def __init__(
        self, network: nn.Module, function: Callable[..., Any], world: World, config: RunConfig
    ) -> None:
        self._call: Callable[..., Any] = function
        self._replicas: DistributedDataParallel | None = None
        if world.size > 1:
            self._call = self._replicas = replicas(Objective(network, function), config)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(*arguments, **keywords)

    def part(self, *, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around both passes over a part of a batch: gradients are exchanged with the last part's alone."""
        return contextlib.nullcontext() if last or self._replicas is None else self._replicas.no_sync()


def replicas(objective: nn.Module, config: RunConfig) -> DistributedDataParallel:
    """``objective`` in DDP, its gradients averaged in ``config.reduce_dtype``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 has another name for the first option
        result = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.reduce_dtype == "bfloat16":
        result.register_comm_hook(None, average_in_bfloat16)
    return result


def average_in_bfloat16(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations as strings
    """DDP's hook for half the traffic (PyTorch's own asks for NCCL, and rounds before it divides)."""
    gradients: Tensor = bucket.buffer()
    rounded = (gradients / dist.get_world_size()).to(torch.bfloat16)
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
