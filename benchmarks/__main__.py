"""The command ``python -m benchmarks``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from benchmarks import gpu_checks, harness
from diffratio_fast import command
from diffratio_fast.storage.writing import replace_file

HERE = Path(__file__).resolve().parent
NAMES = sorted(file.stem.removeprefix("bench_") for file in HERE.glob("bench_*.py"))


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def parse(argv: list[str]) -> Any:
    parser = command.Parser(prog="python -m benchmarks", description=__doc__ and harness.__doc__)
    parser.add_argument("--only", nargs="+", choices=NAMES, metavar="NAME", help=f"of {', '.join(NAMES)}")
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="on the CPU")
    parser.add_argument("--repeats", type=positive, default=50, help="timed calls of each provider")
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise command.UserError("--device cuda: no CUDA device is visible to this PyTorch")
    if options.json is not None:
        folder = options.json.resolve().parent
        if options.json.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise command.UserError(f"--json {options.json}: not a file in a writable directory")
    return options


def main(argv: list[str]) -> int:
    options = parse(argv)
    torch.set_num_threads(options.threads)
    settings = harness.Settings(torch.device(options.device), options.repeats)
    rows: list[dict[str, Any]] = []
    if options.device == "cuda":
        for name in options.only or NAMES:
            gpu_checks.run(name)
    for name in options.only or NAMES:
        module = importlib.import_module(f"benchmarks.bench_{name}")
        for case in module.cases(settings):
            print(f"{name}: {case.op} {case.shape} {case.dtype} {case.passes}", flush=True)
            rows += harness.measure(name, case, settings)
    ceilings = harness.ceilings(settings.device)
    if options.json is not None:
        environment = harness.environment(settings.device)
        content = {"environment": environment, "ceilings": ceilings, "rows": rows}
        replace_file(options.json, json.dumps(content, indent=1) + "\n")
    print(harness.table(rows))
    print(f"ceilings: copy {ceilings['copy_bytes_per_s'] / 1e9:.3g} GB/s", end=", ")
    print(f"matrix product {ceilings['matmul_flop_per_s'] / 1e9:.4g} GFLOP/s")
    for note in dict.fromkeys(settings.notes):
        print(note)
    return 0


if __name__ == "__main__":
    command.run(main)
