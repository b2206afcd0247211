"""Python interface of the simulator: options, device memory, kernels, reports. ``build.build`` makes its
library."""

from __future__ import annotations

import ctypes as C
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Pointer = C.c_void_p
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Types by their numbers in csrc/common/types.h."""
FORWARD, BACKWARD, RANDOM = range(3)


@dataclass(frozen=True)
class Options:
    """How kernels run and on which device; the fields are those of interpreter.h and device.h."""

    schedule: int = FORWARD
    late_copies: bool = True
    late_atomics: bool = True
    approximate: bool = False
    coarse_sums: bool = False
    races: bool = True
    statistics: bool = False
    multiprocessors: int = 2
    most_blocks: int = 1
    shared_per_block: int = 227 * 1024
    shared_per_multiprocessor: int = 228 * 1024
    shared_base: int = 1024 + 128
    seed: int = 1


class _Options(C.Structure):
    _fields_ = [(name, C.c_int) for name in Options.__dataclass_fields__ if name != "seed"] + [
        ("seed", C.c_uint64)
    ]


@dataclass(frozen=True)
class Synchronization:
    """A barrier, commit, wait or fence of a kernel, by the lines of the source that request it."""

    place: str
    operation: str
    executions: int


class Failure(Exception):
    """A report of the simulator, or a result that was not written."""

    @property
    def kind(self) -> str:
        return str(self).partition(":")[0]


class Simulator:
    def __init__(self, library: Path) -> None:
        self.library = C.CDLL(str(library))
        text, number = C.c_char_p, C.c_uint64
        for name, result, arguments in (
            ("allocate", Pointer, [number, text, C.c_int]),
            ("adopt", None, [Pointer, number, text, C.c_int]),
            ("split", None, [Pointer, number]),
            ("release", None, [Pointer]),
            ("count_invalid", number, [Pointer, number]),
            ("error", text, []),
            ("notes", text, []),
            ("launches", text, []),
            ("statistics", text, []),
            ("kernels", text, [text]),
            ("load", C.c_int, [text, text]),
            ("launch", C.c_int, [text, C.c_int, C.c_int, number, C.c_int, C.POINTER(Pointer)]),
            ("synchronizations", text, [text]),
            ("remove", None, [text, text, text]),
            ("weaken", None, [text, text]),
            ("restore", None, [text]),
        ):
            function = getattr(self.library, "simulator_" + name)
            function.restype, function.argtypes = result, arguments
        self.skewed = False
        """Whether buffers lie at multiples of their elements' size only."""
        self.options()

    def options(self, **changes: Any) -> None:
        """Set the options that are named, and all others to their defaults."""
        self.library.simulator_options(C.byref(_Options(**asdict(Options(**changes)))))

    def text(self, name: str, *arguments: bytes) -> str:
        found: bytes = getattr(self.library, "simulator_" + name)(*arguments)
        return found.decode()

    def check(self, code: int) -> None:
        if code:
            raise Failure(self.text("error") or f"error {code}")

    def load(self, ptx: str, name: str) -> None:
        """Load a module in addition to those in nvcc's objects."""
        self.check(self.library.simulator_load(ptx.encode(), name.encode()))

    def launch(
        self,
        kernel: str,
        blocks: int,
        threads: int,
        arguments: list[Any],
        *,
        shared: int = 0,
        cooperative: bool = False,
    ) -> None:
        """Launch a kernel of a loaded module; arguments are ctypes values."""
        places = (Pointer * len(arguments))(*[C.cast(C.byref(a), Pointer) for a in arguments])
        call = (kernel.encode(), blocks, threads, shared, int(cooperative), places)
        self.check(self.library.simulator_launch(*call))

    def kernels(self, part: str) -> list[str]:
        return self.text("kernels", part.encode()).splitlines()

    def synchronizations(self, kernel: str) -> list[Synchronization]:
        rows = (line.split("\t") for line in self.text("synchronizations", kernel.encode()).splitlines())
        return [Synchronization(place, operation, int(count)) for place, operation, count in rows]

    @contextmanager
    def without(self, kernel: str, what: Synchronization, *, weaker: bool = False) -> Iterator[None]:
        """A kernel without a synchronization, or with a wait for one group fewer."""
        if weaker:
            self.library.simulator_weaken(kernel.encode(), what.place.encode())
        else:
            self.library.simulator_remove(kernel.encode(), what.place.encode(), what.operation.encode())
        try:
            yield
        finally:
            self.library.simulator_restore(kernel.encode())


class Buffer:
    """Device memory of a tensor's size, ``skew`` bytes off a multiple of 512 where buffers are skewed."""

    def __init__(self, simulator: Simulator, like: Tensor, name: str, *, filled: bool = True) -> None:
        self.simulator, self.shape, self.dtype = simulator, tuple(like.shape), like.dtype
        self.bytes = like.numel() * like.element_size()
        library = simulator.library
        # packed weights, of bytes, must be aligned
        skew = like.element_size() if simulator.skewed and like.dtype != torch.uint8 else 0
        self.base = library.simulator_allocate(max(self.bytes, 1) + skew, name.encode(), int(filled))
        if skew:
            library.simulator_split(self.base, skew)
        self.pointer = self.base + skew
        if filled and self.bytes:
            content = like.detach().contiguous()
            C.memmove(self.pointer, content.data_ptr(), self.bytes)

    def tensor(self) -> Tensor:
        """The content; raises ``Failure`` if a byte of it was not written."""
        missing = self.simulator.library.simulator_count_invalid(self.pointer, self.bytes)
        if missing:
            raise Failure(f"not written: {missing} of {self.bytes} bytes of a result")
        return self.raw()

    def raw(self) -> Tensor:
        found = torch.empty(self.shape, dtype=self.dtype)
        C.memmove(found.data_ptr(), self.pointer, self.bytes)
        return found


class Memory:
    """Buffers of one call, released at the end of the ``with`` block."""

    def __init__(self, simulator: Simulator) -> None:
        self.simulator = simulator
        self.buffers: list[Buffer] = []

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self.buffers:
            self.simulator.library.simulator_release(buffer.base)

    def of(self, tensor: Tensor, name: str) -> Buffer:
        self.buffers.append(Buffer(self.simulator, tensor, name))
        return self.buffers[-1]

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Buffer:
        self.buffers.append(Buffer(self.simulator, torch.empty(shape, dtype=dtype), name, filled=False))
        return self.buffers[-1]


def largest_error(got: Tensor, exact: Tensor) -> float:
    """The largest difference over the largest exact value; infinite if a result is not finite."""
    a, b = got.double().flatten(), exact.double().flatten()
    if not torch.isfinite(a).all():
        return math.inf
    return float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))


def norm_error(got: Tensor, exact: Tensor) -> float:
    """The norm of the difference over that of the exact values."""
    a, b = got.double().flatten(), exact.double().flatten()
    return float((a - b).norm() / b.norm().clamp_min(1e-30))
