"""The command ``python -m benchmarks``: most useful benchmarks first, results written after each case."""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, harness
from diffratio_fast import command
from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import replace_file

HERE = Path(__file__).resolve().parent
BY_VALUE = ("noise", "ratio", "edm2", "parameters", "step", "methods", "data")
"""The order in which benchmarks run; others follow by name."""


def ordered(names: set[str]) -> list[str]:
    return sorted(names, key=lambda name: (BY_VALUE.index(name) if name in BY_VALUE else len(BY_VALUE), name))


NAMES = ordered({file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py")})


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def seconds(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


def parse(argv: list[str]) -> Any:
    parser = command.Parser(prog="python -m benchmarks", description=__doc__ and harness.__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers here, after each case")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--repeats", type=positive, default=50, help="timed calls of each provider")
    parser.add_argument("--time-limit", type=seconds, metavar="SECONDS", help="end then, with what there is")
    parser.add_argument("--no-checks", action="store_true", help="on CUDA: leave out tests/gpu")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to this PyTorch")
    if options.json is not None:
        folder = options.json.resolve().parent
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise UserError(f"--json {options.json}: not a file in a writable directory")
    return options


class Results:
    """What was measured so far, and the file that holds it."""

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []
        self.failures: list[str] = []
        self.complete = False
        self.environment = harness.environment(device)
        self.ceilings: dict[str, float] = {}

    def write(self) -> None:
        if self.path is not None:
            content = {key: value for key, value in vars(self).items() if key != "path"}
            replace_file(self.path, json.dumps(content, indent=1) + "\n")

    def fail(self, what: str, error: BaseException) -> None:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        self.failures.append(f"{what}: {lines[0][:300]}")
        print(f"FAILED {self.failures[-1]}", flush=True)
        self.write()


def device_lost(device: torch.device) -> bool:
    """Whether an error has made the CUDA context unusable, and with it every later case."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        return False
    except RuntimeError:
        return True


def cases_of(name: str, settings: harness.Settings, results: Results) -> Iterator[harness.Case]:
    """The cases of a benchmark; one that cannot be set up ends that benchmark alone."""
    try:
        yield from importlib.import_module(f"benchmarks.bench_{name}").cases(settings)
    except Exception as error:
        results.fail(name, error)


def run_benchmark(name: str, settings: harness.Settings, results: Results) -> bool:
    """Measure the cases of a benchmark; False where nothing can be measured after them."""
    for case in cases_of(name, settings, results):
        if settings.expired():
            return False
        label = f"{name}: {case.op} {case.shape} {case.dtype} {case.passes}"
        print(label, flush=True)
        try:
            results.rows += harness.measure(name, case, settings)
        except harness.OutOfTime:
            return False
        except Exception as error:
            results.fail(label, error)
        results.write()
        if device_lost(settings.device):
            settings.notes.append(f"the CUDA context is lost since {label}: run the others by --only")
            return False
    return not device_lost(settings.device)


def main(argv: list[str]) -> int:
    began = time.monotonic()
    options = parse(argv)
    torch.set_num_threads(options.threads)
    deadline = math.inf if options.time_limit is None else began + options.time_limit
    settings = harness.Settings(torch.device(options.device), options.repeats, deadline)
    names = ordered(set(options.only or NAMES))
    results = Results(options.json, settings.device)
    if options.device == "cuda" and not options.no_checks:
        results.failures += gpu_checks.run(names, deadline=deadline)
    results.ceilings = harness.ceilings(settings.device)
    results.write()
    results.complete = all(run_benchmark(name, settings, results) for name in names)
    results.write()
    print(harness.table(results.rows))
    print(f"ceilings: copy {results.ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s", end=", ")
    print(f"matrix product {results.ceilings['matmul_flop_per_s'] / 1e9:.4g} GFLOP/s")
    if settings.expired():
        settings.notes.append(f"ended by --time-limit after {len(results.rows)} rows")
    for note in dict.fromkeys(settings.notes):
        print(note)
    for failure in results.failures:
        print(f"FAILED {failure}")
    return 1 if results.failures else 0


if __name__ == "__main__":
    command.run(main)
