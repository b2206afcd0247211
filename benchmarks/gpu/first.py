"""The first run on a GPU: build, parity, compute-sanitizer, benchmarks and profiles in one command.

    python -m benchmarks.gpu.first --out DIR [--time-limit SECONDS] [--only STEP ...]

Needs PyTorch, NumPy, CMake, Ninja, a C++ compiler and nvcc, and no network. Each step has a time limit of its
own, leaves its files in DIR, and does not stop the next where it fails. ``--device cpu`` tries the command
without a GPU: the same steps on the C++ operations; programs that are not installed are skipped.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu.jobs import Job, Jobs
from benchmarks.kernel import KERNELS
from diffratio_fast import command
from diffratio_fast.storage.writing import replace_file

Command = list[str | Path]
PYTHON = sys.executable
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
"""Of compute-sanitizer, by value."""
SANITIZED = ("ratio_loss", "score_difference", "add_noise")
PROFILE_RESERVE = 90.0
"""Seconds that the benchmarks leave for the profiles."""


def build(jobs: Jobs, options: argparse.Namespace) -> None:
    """The extension, for the visible GPU."""
    wish = "1" if options.device == "cuda" else "0"
    line = ["env", f"DIFFRATIO_CUDA={wish}", PYTHON, "setup.py", "build_ext", "--inplace"]
    jobs.run(Job("build", line, 270))
    code = (
        "import json, diffratio_fast; from benchmarks.harness import environment; import torch; "
        f"print(json.dumps(environment(torch.device('{options.device}')), indent=1))"
    )
    jobs.run(Job("environment", [PYTHON, "-c", code], 60))
    jobs.run(Job("nvidia-smi", ["nvidia-smi", "-q"], 20, needs="nvidia-smi"))


def checks(jobs: Jobs, options: argparse.Namespace) -> None:
    """tests/gpu, all of it whatever fails."""
    limit = min(180.0, max(jobs.left() - 40, 1))
    line = ["-m", "benchmarks.gpu_checks", "--device", options.device, "--time-limit", f"{limit:.0f}"]
    jobs.run(Job("checks", [PYTHON, *line, "--json", jobs.out / "checks.json"], limit + 10))


def sanitizer(jobs: Jobs, options: argparse.Namespace) -> None:
    """compute-sanitizer on small calls, of this package's kernels alone where the tool can choose."""
    for tool in TOOLS:
        for op in SANITIZED if tool in ("memcheck", "racecheck") else SANITIZED[:1]:
            check: Command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9"]
            call: Command = [
                PYTHON, "-m", "benchmarks.kernel", "--op", op, "--size", "digits", "--batch", "5",
                "--device", options.device,
            ]  # fmt: skip
            needs = "compute-sanitizer"
            chosen: Command = [*check, "--kernel-name", "kns=diffratio", *call]
            if jobs.run(Job(f"{tool}-{op}", chosen, 45, needs)).startswith("status"):
                jobs.run(Job(f"{tool}-{op}-all-kernels", [*check, *call], 90, needs))


def benchmarks(jobs: Jobs, options: argparse.Namespace) -> None:
    """All benchmarks, each in a process of its own, by value."""
    for name in ("noise", "ratio", "step", "methods"):
        limit = min(150.0, jobs.left() - PROFILE_RESERVE)
        line: Command = [
            PYTHON,
            "-m",
            "benchmarks",
            "--only",
            name,
            "--device",
            options.device,
            "--no-checks",
        ]
        file = jobs.out / f"benchmark-{name}.json"
        extra: Command = [
            "--json",
            file,
            "--time-limit",
            f"{max(limit, 1):.0f}",
            "--repeats",
            str(options.repeats),
        ]
        jobs.run(Job(f"benchmark-{name}", [*line, *extra], limit + 15))


def profiles(jobs: Jobs, options: argparse.Namespace) -> None:
    """An ncu profile of each kernel, one launch, at the size of the predictions."""
    for op, phases in KERNELS.items():
        for phase, kernel in phases.items():
            name = f"profile-{op}" + ("" if phase == "all" else f"-{phase}")
            line: Command = [
                "ncu", "--profile-from-start", "off", "--set", "full", "--kernel-name", f"regex:{kernel}",
                "--launch-count", "1", "--force-overwrite", "--export", jobs.out / name,
                PYTHON, "-m", "benchmarks.kernel", "--op", op, "--phase", phase, "--device", options.device,
            ]  # fmt: skip
            jobs.run(Job(name, [*line, *(["--size", options.size] if options.size else [])], 45, needs="ncu"))
            if (jobs.out / f"{name}.ncu-rep").exists():
                text: Command = ["ncu", "--import", jobs.out / f"{name}.ncu-rep", "--page", "details"]
                jobs.run(Job(f"{name}-details", text, 20))


STEPS: dict[str, Callable[[Jobs, argparse.Namespace], None]] = {
    "build": build, "checks": checks, "sanitizer": sanitizer, "benchmarks": benchmarks, "profiles": profiles,
}  # fmt: skip


def main(argv: list[str]) -> int:
    began = time.monotonic()
    parser = command.Parser(prog="python -m benchmarks.gpu.first", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results/first"), metavar="DIR")
    parser.add_argument("--time-limit", type=float, default=570.0, metavar="SECONDS", help="of all steps")
    parser.add_argument(
        "--only", nargs="+", choices=tuple(STEPS), metavar="STEP", help=f"of {', '.join(STEPS)}"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--repeats", type=int, default=50, help="timed calls in the benchmarks")
    parser.add_argument("--size", help="of the profiled calls (benchmarks/kernel.py)")
    options = parser.parse_args(argv)
    jobs = Jobs(options.out.resolve(), began + options.time_limit)
    for name in options.only or STEPS:
        STEPS[name](jobs, options)
    replace_file(jobs.out / "failed.json", json.dumps(jobs.failed(), indent=1) + "\n")
    return jobs.finish()


if __name__ == "__main__":
    command.run(main)
