"""Cost of a step: FLOPs and peak memory, measured by running it on fake tensors.

The real step runs in ``FakeTensorMode``: tensors have shapes and dtypes, but no storage. Every storage that
an operation allocates is tracked until it is freed, as by PyTorch's allocator; the peak of the sum is the
estimate. It does not include the device's context, workspaces of libraries and fragmentation.
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
    """Cost of a step: FLOPs (matrix products, convolutions and attention) and bytes on one device.

    ``peak`` is the peak of the total; ``state`` networks, average and optimizers; ``gradients`` the stored
    gradients. ``parameters``: number by network.
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
    """Tracks FLOPs and the storages of operations: current and peak bytes."""

    def __init__(self, device: str = "cpu", threads: int = 1) -> None:
        """``device`` and ``threads`` determine the scratch memory of the fused operations."""
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
        """Count the temporary memory of a fused operation, in addition to its arguments and results."""
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
    """Tests on values return False, and attention uses the kernel that stores no attention map."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__:
            return False
        if func is torch.Tensor.tolist:
            return [0.0] * args[0].numel()
        if func is torch.nn.functional.scaled_dot_product_attention:
            return _ATTENTION(*args)[0]
        return func(*args, **(kwargs or {}))


def cost(config: RunConfig, dataset: DataSet, device: torch.device = CPU) -> Cost:
    """Cost of a step of the run on ``device`` with all networks training; nothing is computed."""
    size = config.micro_batch or config.batch_size
    simulated = min(config.batch_size, 2 * size)  # all parts of a batch except the first are alike
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
        iteration.run(batches)  # creates the moments of the optimizers, which belong to the state
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
