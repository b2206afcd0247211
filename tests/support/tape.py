"""``Tape``: a step recorded on the CPU and replayed without Python, instead of a CUDA graph.

It records every operation that PyTorch dispatches, with its tensor arguments, and replays them on the
same memory. Python values that depend on the step are frozen when they are recorded. A read
of the device by the host raises an error. Reductions over processes are recorded and replayed too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {
    aten._local_scalar_dense, aten.item, aten.equal, aten.nonzero, aten.is_nonzero, aten._unique2,
    aten.masked_select, aten.lift_fresh, aten.allclose,
}  # fmt: skip
"""Operations that make the host wait for the device, or copy host values to it."""


def storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def changes_its_arguments(func: Any) -> bool:
    """The schemas of reductions over processes do not mark what they overwrite."""
    return bool(func._schema.is_mutable) or func.namespace == "c10d"


class Tape(TorchDispatchMode):
    """Records operations while it is entered. Like a capture, recording changes no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self.made: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        assert func._overloadpacket not in READS, f"{func} in a captured step"
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if changes_its_arguments(func):
            for tensor in inputs:
                if storage(tensor) not in self.made and id(tensor) not in self.kept:
                    self.kept[id(tensor)] = tensor, tensor.clone()
        out = func(*args, **kwargs)
        known = {storage(tensor) for tensor in inputs}
        fresh = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and storage(leaf) not in known]
        self.made |= {storage(tensor) for tensor in fresh}
        if fresh or changes_its_arguments(func):  # a view stays one
            self.operations.append((func, args, kwargs, fresh))
        return out

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for tensor, before in reversed(self.kept.values()):  # views of one storage may overlap
                tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, fresh in self.operations:
            inputs = {storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
            out = func(*args, **kwargs)
            for work in tree_leaves(out):
                if func.namespace == "c10d" and not isinstance(work, Tensor):
                    work.wait()
            made = [x for x in tree_leaves(out) if isinstance(x, Tensor) and storage(x) not in inputs]
            for target, source in zip(fresh, made, strict=True):
                target.copy_(source)


class Recorder:
    """``Tape`` instead of CUDA graphs."""

    def __init__(self) -> None:
        self.tapes: list[Tape] = []
        self.replayed = 0

    def ordinary(self, function: Callable[[], None]) -> None:
        function()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        with Tape() as tape:
            function()
        self.tapes.append(tape)

        def replay() -> None:
            self.replayed += 1
            tape.replay()

        return replay


class NothingIsWrong(TorchFunctionMode):
    """Skips the checks that only the CPU makes: is a label out of range, a noise level NaN?"""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asking = ("class_vectors", "level", "add_noise")
        if func is Tensor.__bool__ and inspect.stack()[1].function in asking:
            return False
        return func(*args, **(kwargs or {}))
