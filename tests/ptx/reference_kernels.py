"""The small kernels of ``kernels/``: each reference kernel with its exact result, and the planted bugs."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from ptx.simulator import BACKWARD, RANDOM, Failure, Memory, Pointer, Simulator, largest_error
from torch import Tensor

MODES: dict[str, dict[str, Any]] = {
    "forward": {},
    "backward": {"schedule": BACKWARD},
    "random": {"schedule": RANDOM, "seed": 5},
    "forward, copies at once": {"late_copies": False},
    "backward, copies at once": {"schedule": BACKWARD, "late_copies": False},
    "random, copies at once": {"schedule": RANDOM, "seed": 6, "late_copies": False},
}
THREADS = 96  # of a planted kernel


def uniform(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return ((torch.rand(*shape, generator=generator) * 2 - 1) * scale).to(dtype)


@dataclass(frozen=True)
class Case:
    """A call of a reference kernel; ``run`` raises ``Failure`` if its result is wrong."""

    name: str
    kernel: str  # part of its name
    run: Callable[[Simulator], None]


def call(
    simulator: Simulator, function: str, arguments: list[Any], result: tuple[tuple[int, ...], torch.dtype]
) -> Tensor:
    """Call ``reference_<function>``: tensors become buffers, ``...`` the result's, None a scratch like it."""
    simulator.library.simulator_clear()
    with Memory(simulator) as memory:
        out = memory.empty(*result, "result")
        values: list[Any] = []
        for n, argument in enumerate(arguments):
            if argument is ...:
                values.append(Pointer(out.pointer))
            elif isinstance(argument, Tensor):
                values.append(Pointer(memory.of(argument, f"argument {n}").pointer))
            elif argument is None:
                values.append(Pointer(memory.empty(*result, "scratch").pointer))
            else:
                values.append(argument)
        simulator.check(getattr(simulator.library, "reference_" + function)(*values))
        return out.tensor()


def compare(got: Tensor, exact: Tensor, tolerance: float) -> None:
    error = largest_error(got, exact)
    if not error < tolerance:
        raise Failure(f"wrong result: error {error:.1e}, allowed {tolerance:.1e}")


def gemm(simulator: Simulator, samples: int, m: int, n: int, k: int, blocks: int, maps: int = 0) -> None:
    a, b = (uniform(samples, rows, k, dtype=torch.bfloat16, seed=rows + 1) for rows in (m, n))
    shape = (samples, m, n)
    got = call(simulator, "gemm", [a, b, ..., *shape, k, blocks, maps], (shape, torch.float32))
    compare(got, a.double() @ b.double().transpose(1, 2), 1e-6)


def reduce(simulator: Simulator, samples: int, size: int, blocks: int) -> None:
    x = uniform(samples, size) + 0.5
    got = call(simulator, "reduce", [x, ..., samples, size, blocks], ((samples,), torch.float32))
    compare(got, x.double().sum(1), 1e-6)


def mix(simulator: Simulator, tokens: int, channels: int, samples: int, blocks: int) -> None:
    x = uniform(samples, tokens, channels, dtype=torch.bfloat16)
    m = uniform(tokens, tokens, scale=0.3, dtype=torch.bfloat16, seed=2)
    w = uniform(channels, channels, scale=0.3, dtype=torch.bfloat16, seed=3)
    got = call(simulator, "mix", [tokens, x, m, w, ..., samples, blocks], (tuple(x.shape), torch.float32))
    y = x.double() + m.double() @ x.double()
    # y is rounded to bf16 between the stages: a value near a tie may be rounded in the other direction
    compare(got, y + y.float().bfloat16().double() @ w.double().T, 2e-3)


def relay(simulator: Simulator, rounds: int) -> None:
    x = uniform(rounds, 64)
    compare(call(simulator, "relay", [x, ..., rounds], ((64,), torch.float32)), x.double().sum(0), 1e-6)


def share(simulator: Simulator, size: int, blocks: int) -> None:
    x = uniform(size) + 2
    arrived = torch.zeros(1, dtype=torch.int32)
    got = call(simulator, "share", [x, ..., None, arrived, size, blocks], ((size,), torch.float32))
    compare(got, x.double() / x.double().sum(), 1e-6)


def operations(simulator: Simulator) -> None:
    x = torch.arange(64, dtype=torch.int16).view(torch.bfloat16)  # only the bits matter
    got = call(simulator, "operations", [x, ...], ((32, 12), torch.int32))

    def pair(low: int, high: int) -> int:
        return low | high << 16

    for lane in range(32):
        row, c = lane // 4, lane % 4 * 2
        want = [
            pair(row * 8 + c, row * 8 + c + 1), pair((7 - row) * 8 + c, (7 - row) * 8 + c + 1),
            pair(c * 8 + row, (c + 1) * 8 + row), pair((7 - c) * 8 + row, (6 - c) * 8 + row), 105,
            100 + (lane ^ 3), 100 + (lane + 4 if lane < 28 else lane), 0 if lane % 4 else pair(0, 1),
            lane, 256,
            pair(2 * lane, 2 * lane + 1), 102 if lane < 16 else 0,
        ]  # fmt: skip
        if got[lane].tolist() != want:
            raise Failure(f"wrong result: lane {lane} has {got[lane].tolist()}, should have {want}")


# Odd grids, partial tiles, one and several samples per block, one to five steps of depth.
CASES = [
    *(Case(f"gemm {a}", "gemm_kernel", lambda s, a=a: gemm(s, *a))  # type: ignore[misc]
      for a in ((2, 48, 80, 80, 3), (3, 16, 16, 16, 1), (1, 64, 32, 32, 5), (5, 16, 48, 48, 2))),
    *(Case(f"reduce {a}", "reduce_kernel", lambda s, a=a: reduce(s, *a))  # type: ignore[misc]
      for a in ((5, 300, 2), (3, 1, 1))),
    Case("mix (32, 16, 5, 2)", "mix_kernelILi32", lambda s: mix(s, 32, 16, 5, 2)),
    Case("mix (64, 64, 3, 1)", "mix_kernelILi64", lambda s: mix(s, 64, 64, 3, 1)),
    Case("relay 5", "relay_kernel", lambda s: relay(s, 5)),
    Case("share (100, 3)", "share_kernel", lambda s: share(s, 100, 3)),
    Case("operations", "operations_kernel", operations),
]  # fmt: skip


@dataclass(frozen=True)
class Planted:
    number: int
    name: str
    expected: tuple[str, ...]  # kinds of reports; of a correct kernel none, or "counted"
    blocks: int


def planted(simulator: Simulator) -> list[Planted]:
    library = simulator.library
    for name in ("name", "expected"):
        getattr(library, "planted_" + name).restype = C.c_char_p
    found = []
    for n in range(library.planted_count()):
        expected = library.planted_expected(n).decode()
        kinds = tuple(expected.split("|")) if expected else ()
        found.append(Planted(n, library.planted_name(n).decode(), kinds, library.planted_blocks(n)))
    return found


def run_planted(simulator: Simulator, which: Planted) -> str:
    """The kind of the report, "counted" or "miscounted", or "" if nothing was found."""
    simulator.library.simulator_clear()
    with Memory(simulator) as memory:
        source = memory.of(torch.ones(2 * 4 * THREADS), "in")
        out = memory.empty((which.blocks, 4 * THREADS), torch.float32, "out")
        words = memory.of(torch.tensor([0, 0, 2, 0], dtype=torch.int32), "words")
        pointers = [Pointer(b.pointer) for b in (source, out, words)]
        try:
            simulator.check(simulator.library.planted_launch(which.number, *pointers))
        except Failure as failure:
            return failure.kind
        return {0: "miscounted", 1: "counted"}.get(int(words.raw()[2]), "")
