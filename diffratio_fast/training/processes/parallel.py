"""Data-parallel training of one network, by PyTorch's own engine: DDP or FSDP2.

Each process takes its slice of a batch; gradients are averaged over the processes while the backward pass
runs. A step that is captured in a CUDA graph averages them after the backward pass instead: DDP's reducer
keeps state on the host, which a replay would skip. A step's numbers are those of one process but for the
order of sums: random numbers belong to a sample's index in the whole batch.
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
        """What comes before the first pass after an update."""
        if self.sharded:
            force_normalization(self.network)  # in a pass it would find copies of the weights

    @contextlib.contextmanager
    def part(self, *, last: bool) -> Iterator[None]:
        """Around both passes over a part of a batch: gradients are exchanged with the last part's alone."""
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
        """FSDP2 leaves out what has no dimension to cut."""
        whole = [p.grad for p in self.network.parameters() if not is_sharded(p) and p.grad is not None]
        if whole:
            means = self.world.mean(torch.stack(whole))
            torch._foreach_copy_(whole, list(means.unbind()))


def shard(network: nn.Module, world: World, config: RunConfig, device: torch.device) -> None:
    """Cut the weights of a network into a part for each process, in place, block by block (FSDP2).

    A RatioMixer stays whole: it is small, and the fused operations take its weights as they are.
    """
    if world.size == 1 or config.parallel != "fsdp" or isinstance(network, RatioMixer):
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    options: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (world.size,)),
        # weights are parts wherever no pass is under way: optimizers, averages and checkpoints count on it
        "reshard_after_forward": True,
        "ignored_params": {p for p in network.parameters() if not p.dim()},
        "mp_policy": MixedPrecisionPolicy(
            reduce_dtype=torch.bfloat16 if config.reduce_dtype == "bfloat16" else None
        ),
    }
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # nothing here changes its result
    for module in network.modules():
        if isinstance(module, ResidualBlock):
            fully_shard(module, **options)
    fully_shard(network, **options)
    if isinstance(network, EDM2Denoiser):
        register_fsdp_forward_method(network, "log_variance")


@torch.no_grad()
def gather(sharded: nn.Module, whole: nn.Module | None) -> None:
    """Copy the weights of a sharded network to ``whole``, a network like it; all processes take part."""
    target = None if whole is None else whole.state_dict()
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
    """DDP's hook for half the traffic (PyTorch's own asks for NCCL, and rounds before it divides)."""
    gradients: Tensor = bucket.buffer()
    rounded = (gradients / dist.get_world_size()).to(torch.bfloat16)
    work = dist.all_reduce(rounded, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))
