"""The checks of ``tests/gpu`` without pytest: one after the other, whatever fails.

    python -m benchmarks.gpu_checks [NAME ...] [--device cuda|cpu] [--json FILE] [--time-limit SECONDS]

They run in a process of their own, because an illegal access makes a CUDA context unusable: the checks after
such a failure, or after a crash, run in a new process. On the CPU the same checks compare the C++ operations,
except for those that only a GPU can run.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from diffratio_fast import command
from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import replace_file

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "tests" / "gpu"
LOST_CONTEXT = 3
"""Exit status of a process whose CUDA context has become unusable."""


def available() -> list[str]:
    return sorted(path.stem.removesuffix("_checks") for path in FOLDER.glob("*_checks.py"))


def load(name: str) -> ModuleType:
    """``<name>_checks.py`` of the folder."""
    path = FOLDER / f"{name}_checks.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen(module: ModuleType, device: str) -> list[str]:
    """Names of a module's checks that the device can run."""
    only_cuda = {check.__name__ for check in module.CUDA_ONLY}
    names = [check.__name__ for check in module.CHECKS]
    return names if device == "cuda" else [name for name in names if name not in only_cuda]


def result(check: str, failure: str | None = None, seconds: float = 0.0) -> dict[str, Any]:
    return {"check": check, "seconds": seconds, "failure": failure}


def work(name: str, device: str, first: int) -> int:
    """In the child process: run the checks from number ``first`` on, one line of JSON for each."""
    module = load(name)
    vars(module)["DEVICE"] = torch.device(device)
    for check in chosen(module, device)[first:]:
        began, failure = time.monotonic(), None
        try:
            getattr(module, check)()
        except Exception as error:  # any: the others are still worth running
            lines = str(error).strip().splitlines() or [""]
            failure = f"{type(error).__name__}: {lines[0][:300]}"
        print(json.dumps(result(check, failure, time.monotonic() - began)), flush=True)
        if device == "cuda":
            try:
                torch.cuda.synchronize()
            except RuntimeError:
                return LOST_CONTEXT
    return 0


def attempt(name: str, device: str, first: int, deadline: float) -> tuple[list[dict[str, Any]], str]:
    """Lines of one child process, and why it ended before its last check ("" where it did not)."""
    arguments = ["-m", "benchmarks.gpu_checks", name, "--device", device, "--from", str(first)]
    arguments += ["--folder", str(FOLDER)]
    process = subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    left = deadline - time.monotonic()
    timer = threading.Timer(max(left, 0.0), process.kill) if math.isfinite(left) else None
    if timer is not None:
        timer.start()
    assert process.stdout is not None
    lines = []
    for text in process.stdout:
        line = json.loads(text)
        lines.append(line)
        outcome = line["failure"] or "ok"
        print(f"{name}: {line['check']}: {outcome} ({line['seconds']:.1f} s)", flush=True)
    status = process.wait()
    if timer is not None:
        timer.cancel()
    if status == 0 or (status == LOST_CONTEXT and lines and lines[-1]["failure"]):
        return lines, ""
    if time.monotonic() >= deadline:
        return lines, "the time limit was reached"
    return lines, f"its process ended with status {status}"


def run(
    names: list[str], *, device: str = "cuda", deadline: float = math.inf, path: Path | None = None
) -> list[str]:
    """Run the checks of those ``names`` that have any; the failures, one line each.

    ``path``: a JSON file of all results, replaced as they come.
    """
    rows: list[dict[str, Any]] = []
    for name in [name for name in names if name in available()]:
        todo = chosen(load(name), device)
        while todo and time.monotonic() < deadline:
            lines, ended = attempt(name, device, len(chosen(load(name), device)) - len(todo), deadline)
            if ended and len(lines) < len(todo):
                lines.append(result(todo[len(lines)], ended))
            todo = todo[max(len(lines), 1) :]
            rows += [{"name": name, **line} for line in lines]
            if path is not None:
                replace_file(path, json.dumps(rows, indent=1) + "\n")
        rows += [{"name": name, **result(check, "not run: out of time")} for check in todo]
    failures = [f"{row['name']}: {row['check']}: {row['failure']}" for row in rows if row["failure"]]
    print(f"{len(rows) - len(failures)} of {len(rows)} checks passed on {device}", flush=True)
    return failures


def main(argv: list[str]) -> int:
    global FOLDER
    parser = command.Parser(prog="python -m benchmarks.gpu_checks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(available())}; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here, as they come")
    parser.add_argument("--time-limit", type=float, default=math.inf, metavar="SECONDS")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    FOLDER = options.folder
    if unknown := sorted(set(options.names) - set(available())):
        raise UserError(f"{unknown[0]}: no such checks; choose from {', '.join(available())}")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is visible to this PyTorch")
    if options.first is not None:
        return work(options.names[0], options.device, options.first)
    deadline = time.monotonic() + options.time_limit
    failures = run(options.names or available(), device=options.device, deadline=deadline, path=options.json)
    for failure in failures:
        print(f"FAILED {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    command.run(main)
