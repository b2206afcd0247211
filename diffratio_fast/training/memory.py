"""What a step would cost: FLOPs and peak memory, found by running it on tensors without numbers.

The step is the real one, on ``FakeTensorMode``'s tensors: shapes and types, no storage. Every storage that
an operation makes is followed until it is freed, as PyTorch's allocator would; the sum's peak is the
estimate. It leaves out what PyTorch keeps for itself: the device's context, workspaces of libraries,
fragmentation.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from diffratio_fast.config.run import RunConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.ops.ratio_scratch import scratch_bytes
from diffratio_fast.training.kinds import KINDS
from diffratio_fast.training.state.run_state import run_dtype

CPU = torch.device("cpu")
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True)
class Cost:
    """Of a step: FLOPs (of matrix products, convolutions and attention) and bytes on one device.

    ``peak`` is all at its highest; ``state`` networks, average and optimizers; ``gradients`` what is kept of
    them between operations. ``parameters`` by network.
    """

    parameters: dict[str, int]
    flops: float
    state: int
    gradients: int
    peak: int

    @property
    def activations(self) -> int:
        return self.peak - self.state - self.gradients


class Tracker(TorchDispatchMode):
    """Follows FLOPs and the storages that operations make: bytes now and at most."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        """``device`` and ``threads`` decide what the fused operations take for themselves."""
        super().__init__()
        self._device, self._threads = device, threads
        self.flops = 0
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        elif func._overloadpacket in (_ATTENTION, _ATTENTION_BACKWARD):
            query, key, _ = args[:3] if func._overloadpacket is _ATTENTION else args[1:4]
            products = 2 if func._overloadpacket is _ATTENTION else 5
            self.flops += products * 2 * query.numel() * key.shape[-2]
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        if func.namespace == "diffratio":
            self._in_passing(func._overloadpacket.__name__, args)
        return out

    def _in_passing(self, operation: str, arguments: Any) -> None:
        """Count what a fused operation takes while it runs, with its arguments and results."""
        if operation in ("log_ratio", "score_difference", "ratio_loss"):
            weights, images = arguments[:2]
        elif operation == "log_ratio_backward":
            _, weights, images = arguments[:3]
        else:
            return
        samples = len(images) * (2 if operation == "ratio_loss" else 1)
        scratch = scratch_bytes(operation, weights, samples, device=self._device, threads=self._threads)
        self.peak = max(self.peak, self.now + scratch)

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)


class _WithoutNumbers(TorchFunctionMode):
    """Questions about values are answered no, and attention is the one kernel that keeps no map."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return False
        if func is torch.Tensor.tolist:
            return [0.0] * args[0].numel()
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _ATTENTION(*args)[0]
        return func(*args, **(kwargs or {}))


def cost(config: RunConfig, dataset: DataSet, device: torch.device = CPU) -> Cost:
    """What a step of the run on ``device`` costs once all its networks train; nothing is computed."""
    size = config.micro_batch or config.batch_size
    simulated = min(config.batch_size, 2 * size)  # the parts of a batch are alike, but the first
    small = replace(config, batch_size=simulated, on_nonfinite="stop", compile=False, capture=False)
    following = Tracker(device.type, config.threads or torch.get_num_threads())
    with _default_dtype(run_dtype(config)), FakeTensorMode(), following as tracker, _WithoutNumbers():
        iteration = KINDS[type(config)].new_iteration(small, dataset, CPU, planned=True)
        iteration.state.step = config.settled_step
        networks = iteration.trained()
        state = tracker.now
        records = torch.zeros(
            simulated, *dataset.shape, dtype=torch.uint8 if dataset.kind == "image" else torch.float16
        )
        batch = (records, torch.zeros(simulated, dtype=torch.int64))
        batches = [batch] * config.batches_per_step
        iteration.run(batches)  # makes the optimizers' moments, which belong to the state
        gradients = sum(
            p.grad.nbytes for network in networks.values() for p in network.parameters() if p.grad is not None
        )
        state = tracker.now - gradients - records.nbytes - batch[1].nbytes
        tracker.flops, tracker.peak = 0, tracker.now
        iteration.run(batches)
        peak = tracker.peak
        record_bytes = records.nbytes // simulated
        parameters = {
            name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()
        }
    peak += (config.batch_size - simulated) * record_bytes
    return Cost(parameters, tracker.flops / simulated * config.batch_size, state, gradients, peak)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
