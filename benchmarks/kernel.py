"""One call of one fused operation, for a profiler.

    ncu --profile-from-start off --set full python -m benchmarks.kernel --op ratio_loss --phase products

Warms up outside the profiled region, then makes one call inside it. ``--list`` prints the operations, their
phases and the kernel of each; ``--phase`` chooses how ``ratio_loss`` is launched. On the CPU the C++
operation is called in the same way.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.bench_ratio import SIZES, Problem
from diffratio_fast import command, ops
from diffratio_fast.errors import UserError
from diffratio_fast.ops import Purpose, compiled

KERNELS: dict[str, dict[str, str]] = {
    "add_noise": {"all": "add_noise_kernel"},
    "random_words": {"all": "random_words_kernel"},
    "pack_weights": {"all": "pack_kernel"},
    "log_ratio": {"all": "mixer_kernel"},
    "score_difference": {"all": "mixer_kernel"},
    "ratio_loss": {
        "samples": "mixer_kernel", "products": "gradient_kernel", "one-launch": "ratio_loss_kernel",
    },
}  # fmt: skip
"""By operation and phase: part of the name of the kernel that does it."""
FORMS = {"samples": "several", "products": "several", "one-launch": "one launch"}
"""How ``ratio_loss`` is launched for a phase."""
ALL_SIZES = SIZES["cuda"] | {"digits": SIZES["cpu"]["digits"]}
WARMUP = 3


def call_of(op: str, p: Problem) -> Callable[[], Any]:
    """The operation on the problem's tensors."""
    purposes = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE)
    return {
        "add_noise": lambda: ops.add_noise((p.real, p.fake), p.sigma[:, 0], p.rng, p.index, purposes),
        "random_words": lambda: ops.random_words(p.rng, p.index, Purpose.NOISE_REAL, p.real[0].numel()),
        "pack_weights": lambda: ops.pack_weights(p.constants),
        "log_ratio": lambda: p.log_ratio(ops.log_ratio),
        "score_difference": p.fused_score,
        "ratio_loss": p.fused_loss,
    }[op]


@contextlib.contextmanager
def profiled(device: torch.device) -> Iterator[None]:
    """The region that a profiler records with ``--profile-from-start off``."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def choose_form(phase: str) -> None:
    choose = getattr(compiled.module, "use_ratio_loss_form", None)  # CUDA builds have it
    if choose is not None:
        choose(FORMS.get(phase, "automatic"), 256 << 20)


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.kernel", description=__doc__)
    parser.add_argument("--op", choices=tuple(KERNELS), default="score_difference")
    parser.add_argument("--phase", help="of the operation; default: its first")
    parser.add_argument("--size", choices=tuple(ALL_SIZES), default="CIFAR-10, C=128")
    parser.add_argument("--batch", type=int, help="samples; default: those of the size")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--list", action="store_true", help="print operations, phases and kernels")
    options = parser.parse_args(argv)
    if options.list:
        for op, phases in KERNELS.items():
            for phase, kernel in phases.items():
                print(op, phase, kernel)
        return 0
    phase = options.phase or next(iter(KERNELS[options.op]))
    if phase not in KERNELS[options.op]:
        known = ", ".join(KERNELS[options.op])
        raise UserError(f"--phase {phase}: {options.op} has the phases {known}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to this PyTorch")
    size = ALL_SIZES[options.size]
    if options.batch is not None:
        if options.batch < 1:
            raise UserError(f"--batch {options.batch}: must be at least 1")
        size = (*size[:-1], options.batch)
    device = torch.device(options.device)
    choose_form(phase)
    call = call_of(options.op, Problem(device, size))
    for _ in range(WARMUP):
        call()
    began = time.perf_counter()
    with profiled(device):
        call()
    print(f"{options.op} {phase}, {options.size}, B={size[-1]}: {(time.perf_counter() - began) * 1e3:.3f} ms")
    return 0


if __name__ == "__main__":
    command.run(main)
