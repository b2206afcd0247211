"""Data-parallel training of one network with PyTorch's DDP or FSDP2.

Each process computes its slice of a batch; gradients are averaged over the processes during the backward
pass. A step captured in a CUDA graph averages them after the backward pass instead: DDP's reducer has host
state, which a replay would skip. The result equals that of one process except for the order of sums: random
numbers depend on a sample's index in the global batch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diffratio_fast.config.run import RunConfig
from diffratio_fast.networks.edm2 import EDM2Denoiser, force_normalization
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.networks.unet import ResidualBlock
from diffratio_fast.training.processes.world import World, is_sharded


class Objective(nn.Module):
    """A training computation with a network, as a module, so that DDP can hook its forward pass."""

    def __init__(self, network: nn.Module, function: Callable[..., Any]) -> None:
        super().__init__()
        self.network, self.function = network, function

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return self.function(*arguments, **keywords)


class Parallel:
    """``function`` of a network's weights for training; gradients are averaged over processes."""

    def __init__(
        self, network: nn.Module, function: Callable[..., Any], world: World, config: RunConfig
    ) -> None:
        self.network, self.world = network, world
        self.sharded = any(map(is_sharded, network.parameters()))
        self._call: Callable[..., Any] = function
        self._replicas: DistributedDataParallel | None = None
        self.reduce_dtype = torch.bfloat16 if config.reduce_dtype == "bfloat16" else None
        self._averages_after = world.size > 1 and not self.sharded and config.capture
        if world.size > 1 and not self.sharded and not config.capture:
            self._call = self._replicas = replicas(Objective(network, function), config)

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        return self._call(*arguments, **keywords)

    def prepare(self) -> None:
        """Prepare the network before the first forward pass after an update."""
        if self.sharded:
            force_normalization(self.network)  # during a pass the weights are gathered copies

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Context of both passes over a part of a batch; gradients are exchanged only for the last part."""
        if self._replicas is not None:
            with contextlib.nullcontext() if last else self._replicas.no_sync():
                yield
            return
        if self.sharded:
            self.network.set_requires_gradient_sync(last)  # type: ignore[operator]
        yield
        if self.sharded and last:
            self._average_scalars()
        if self._averages_after and last:
            self._average_gradients()

    @torch.no_grad()
    def _average_gradients(self) -> None:
        """Replace every gradient by its mean over the processes: one all-reduce for each dtype."""
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for parameter in self.network.parameters():
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients]).div_(self.world.size)
            means = self.world.sum(flat if self.reduce_dtype is None else flat.to(self.reduce_dtype))
            parts = means.split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(
                gradients, [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]
            )

    def _average_scalars(self) -> None:
        """Average gradients of scalars, which FSDP2 cannot shard."""
        complete = [p.grad for p in self.network.parameters() if not is_sharded(p) and p.grad is not None]
        if complete:
            means = self.world.mean(torch.stack(complete))
            torch._foreach_copy_(complete, list(means.unbind()))


def shard(network: nn.Module, world: World, config: RunConfig, device: torch.device) -> None:
    """Shard the weights of a network over the processes, in place, block by block (FSDP2).

    A RatioMixer is not sharded: it is small, and the fused operations need complete weights.
    """
    if world.size == 1 or config.parallel != "fsdp" or isinstance(network, RatioMixer):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        # weights are sharded outside of passes; optimizers, averages and checkpoints depend on it
        "reshard_after_forward": True,
        "ignored_params": {p for p in network.parameters() if not p.dim()},
        "mp_policy": MixedPrecisionPolicy(
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bfloat16" else None
        ),
    }
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # does not affect the result
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            fully_shard(module, **options)
    fully_shard(network, **options)
    if isinstance(network, EDM2Denoiser):
        register_fsdp_forward_method(network, "log_variance")


@torch.no_grad()
def gather(sharded: nn.Module, complete: nn.Module | None) -> None:
    """Copy the weights of a sharded network to ``complete``, an unsharded copy; a collective operation."""
    target = None if complete is None else complete.state_dict()
    for name, tensor in sharded.state_dict().items():
        value = tensor.full_tensor() if is_sharded(tensor) else tensor
        if target is not None:
            target[name].copy_(value)


def replicas(objective: nn.Module, config: RunConfig) -> DistributedDataParallel:
    """``objective`` in DDP, its gradients averaged in ``config.reduce_dtype``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch 2.13 has another name for the first option
        result = DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
    if config.reduce_dtype == "bfloat16":
        result.register_comm_hook(None, average_in_bfloat16)
    return result


def average_in_bfloat16(state, bucket):  # type: ignore[no-untyped-def]  # DDP refuses annotations as strings
    """DDP hook with half the traffic (PyTorch's own needs NCCL, and rounds before dividing)."""
    gradients: Tensor = bucket.buffer()
    rounded = (gradients / dist.get_world_size()).to(torch.bfloat16)
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
