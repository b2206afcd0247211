"""Executes the CUDA kernels on the CPU, from nvcc's PTX: all cases, planted bugs, mutations, counts.

    python tests/ptx/run.py [--architecture 80|90a] [--only TEXT] [--marks] [--nvrtc] [--mutate]
                             [--count CASE]

Without options all cases for sm_80: minutes on one core, without the compilation. Objects are kept in
build/ptx. Exit status 1 if something fails.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(HERE.parent)]

from ptx import counts, mutation, nvrtc, operations  # noqa: E402
from ptx.build import ARCHITECTURES, build  # noqa: E402
from ptx.cases import all_cases  # noqa: E402
from ptx.reference_kernels import CASES, MODES, planted, run_planted  # noqa: E402
from ptx.simulator import Failure, Simulator  # noqa: E402

OBJECTS = ROOT / "build" / "ptx"


def run_cases(simulator: Simulator, only: str) -> int:
    """Run the cases whose names contain ``only``; return the number of failures."""
    failed = count = 0
    for case in all_cases():
        if only not in case.name:
            continue
        began = time.monotonic()
        try:
            outcome = f"PASS  {case.name}: {case(simulator)}"
        except Failure as failure:
            outcome = f"FAIL  {case.name}: {failure}"
            failed += 1
        count += 1
        print(f"{outcome}  [{time.monotonic() - began:.1f} s]", flush=True)
        for note in simulator.text("notes").splitlines():
            print(f"      note: {note}")
    print(f"{count - failed} of {count} cases passed")
    return failed


def run_small(simulator: Simulator, only: str) -> int:
    """Run reference kernels and planted bugs in every mode; return the number of unexpected results."""
    wrong = count = 0
    for mode, options in MODES.items():
        simulator.options(multiprocessors=8, **options)
        for case in CASES:
            if only not in case.name:
                continue
            count += 1
            try:
                case.run(simulator)
            except Failure as failure:
                wrong += 1
                print(f"FAIL  {case.name}, {mode}: {failure}")
        for bug in planted(simulator):
            if only not in bug.name:
                continue
            count += 1
            kind = run_planted(simulator, bug)
            if kind not in (bug.expected or ("",)):
                wrong += 1
                expected = " or ".join(bug.expected) or "nothing"
                print(f"FAIL  {bug.name}, {mode}: {kind or 'nothing'}, not {expected}")
    print(f"{count - wrong} of {count} runs of reference kernels and planted bugs as expected")
    return wrong


def run_mutations(simulator: Simulator, only: str) -> int:
    """Mutate reference and project kernels; return the number of unneeded synchronizations."""
    subjects = [s for s in [*mutation.reference_subjects(), *mutation.PROJECT] if only in s.name]
    found = mutation.mutate(simulator, subjects, list(MODES), report=lambda line: print(line, flush=True))
    for place, operation in found.missed():
        print(f"FAIL  {operation} at {place}: nothing misses it")
    for place, operation in found.weaker_missed():
        print(f"note: {operation} at {place} could wait for one group fewer")
    print(f"{len(found.caught)} of {len(found.tried)} synchronizations are missed when taken out")
    return len(found.missed())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--architecture", choices=ARCHITECTURES, default="80")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name contains it")
    parser.add_argument("--marks", action="store_true", help="check arrays of shared memory and samples too")
    parser.add_argument("--nvrtc", action="store_true", help="execute what NVRTC makes of the kernels")
    parser.add_argument("--mutate", action="store_true", help="take synchronizations out, one at a time")
    parser.add_argument("--count", metavar="CASE", help="count instructions and bank conflicts of one case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    simulator = Simulator(build(OBJECTS, options.architecture, marks=options.marks))
    operations.prepare(simulator)
    if options.nvrtc:
        architecture = options.architecture.removesuffix("a")
        nvrtc.load_noise_kernels(simulator, architecture)
        print(f"{nvrtc.load_ratio_kernels(simulator, architecture)} ratio kernels from NVRTC")
    if options.count is not None:
        (case,) = [case for case in all_cases() if case.name == options.count] or [None]
        if case is None:
            parser.error(f"--count {options.count}: no such case; names are those that a run prints")
        print(counts.report(simulator, case))
        return 0
    if options.mutate:
        return int(run_mutations(simulator, options.only) > 0)
    failed = run_cases(simulator, options.only)
    if options.marks:
        failed += run_small(simulator, options.only)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
