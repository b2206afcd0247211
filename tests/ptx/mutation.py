"""Removes synchronizations one at a time: if the simulator then reports nothing, the synchronization is
unneeded or not covered by a test.

A synchronization is a barrier, commit, wait or fence,
identified by the source lines that request it (through inlined
functions). Waits are also tried with one group fewer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from ptx.cases import call
from ptx.operations import Form
from ptx.problems import Problem, Setting
from ptx.reference_kernels import CASES as REFERENCE
from ptx.reference_kernels import MODES
from ptx.simulator import Failure, Simulator, Synchronization
from torch import Tensor

Run = Callable[[Simulator], dict[str, Tensor]]


@dataclass(frozen=True)
class Subject:
    """A call from whose kernel synchronizations are removed; ``run`` returns results that must not change."""

    name: str
    kernel: str  # part of its name
    run: Run
    multiprocessors: int = 2


@dataclass
class Mutants:
    """(place, operation) to the modes in which a mutant was reported, and the kinds of the reports."""

    tried: set[tuple[str, str]] = field(default_factory=set)
    caught: dict[tuple[str, str], set[str]] = field(default_factory=dict)
    weaker_tried: set[tuple[str, str]] = field(default_factory=set)
    weaker_caught: dict[tuple[str, str], set[str]] = field(default_factory=dict)

    def missed(self) -> list[tuple[str, str]]:
        return sorted(self.tried - self.caught.keys())

    def weaker_missed(self) -> list[tuple[str, str]]:
        return sorted(self.weaker_tried - self.weaker_caught.keys())


def ratio(kind: str, shape: str, batch: int, form: Form = Form.SEVERAL, slice_units: int = 0) -> Run:
    setting = Setting(shape, batch, 2 if kind == "score" else 1, 2 if kind == "loss" else 1, seed=3)
    return lambda simulator: (
        call(
            simulator,
            kind,
            Problem(setting),
            form=form,
            slice_units=slice_units,
            divergence=3 if kind == "score" else 0,
        ).results
    )


def mixer_kernel(width: int, rows: int, parts: int, pass_: int) -> str:
    return f"mixer_kernelINS0_5ShapeILi{width}ELi{rows}ELi{parts}EEELNS0_4PassE{pass_}E"


ONE_LAUNCH = "ratio_loss_kernelINS0_5ShapeILi{}ELi{}E"
PROJECT = [
    Subject("log_ratio, 64 channels", mixer_kernel(64, 16, 1, 0), ratio("log_ratio", "small", 6)),
    Subject("log_ratio, odd sizes", mixer_kernel(64, 16, 1, 0), ratio("log_ratio", "tall", 6)),
    Subject("score, 64 channels", mixer_kernel(64, 16, 1, 1), ratio("score", "small", 4)),
    Subject("loss, 64 channels", mixer_kernel(64, 16, 1, 2), ratio("loss", "small", 3, slice_units=6)),
    Subject("products", "gradient_kernel", ratio("loss", "tall", 3, slice_units=3)),
    Subject(
        "one launch, 64 channels", ONE_LAUNCH.format(64, 16), ratio("loss", "tall", 4, Form.ONE_LAUNCH, 3)
    ),
    Subject(
        "one launch, several units", ONE_LAUNCH.format(64, 16), ratio("loss", "small", 6, Form.ONE_LAUNCH, 6)
    ),
    Subject(
        "one launch, 128 channels", ONE_LAUNCH.format(128, 16), ratio("loss", "wide", 4, Form.ONE_LAUNCH, 4)
    ),
    Subject("score, 32 rows", mixer_kernel(64, 32, 1, 1), ratio("score", "129 tokens", 4)),
    Subject("score, 128 channels", mixer_kernel(128, 16, 1, 1), ratio("score", "wide", 4)),
    Subject("score, 256 channels in parts", mixer_kernel(256, 16, 2, 1), ratio("score", "256, two parts", 3)),
    Subject("loss, 256 channels in parts", mixer_kernel(256, 16, 2, 2), ratio("loss", "256, two parts", 3)),
]


def reference_subjects() -> list[Subject]:
    def subject(case: Any) -> Subject:
        def run(simulator: Simulator) -> dict[str, Tensor]:
            case.run(simulator)
            return {}

        return Subject(case.name, case.kernel, run, multiprocessors=8)

    return [subject(case) for case in REFERENCE]


def outcome(simulator: Simulator, subject: Subject, mode: dict[str, Any], want: dict[str, Tensor]) -> str:
    """The kind of the report, "other results", or "" if the mutant was not detected."""
    simulator.options(multiprocessors=subject.multiprocessors, **mode)
    try:
        got = subject.run(simulator)
    except Failure as failure:
        return failure.kind
    same = all(torch.equal(got[name], value) for name, value in want.items())
    return "" if same else "other results"


def mutate(
    simulator: Simulator, subjects: list[Subject], modes: list[str], *, least: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> Mutants:  # fmt: skip
    """Try every synchronization that the subjects execute in the modes; with ``least`` until one reports
    it."""
    found = Mutants()
    for subject in subjects:
        simulator.options(multiprocessors=subject.multiprocessors, statistics=True)
        simulator.text("statistics")
        want = subject.run(simulator)
        (kernel,) = simulator.kernels(subject.kernel)[:1]
        for what in simulator.synchronizations(kernel):
            if not what.executions:
                continue
            key = what.place, what.operation
            _try(simulator, subject, kernel, what, modes, want, least, found.tried, found.caught, False)
            if what.operation == "cp.async.wait_group":
                weaker = found.weaker_tried, found.weaker_caught
                _try(simulator, subject, kernel, what, modes, want, least, *weaker, True)
            kinds = ", ".join(sorted(found.caught.get(key, ()))) or "NOT REPORTED"
            report(f"{subject.name}: without {what.operation} at {what.place}: {kinds}")
    return found


def _try(
    simulator: Simulator, subject: Subject, kernel: str, what: Synchronization, modes: list[str],
    want: dict[str, Tensor], least: bool, tried: set[tuple[str, str]], caught: dict[tuple[str, str],
    set[str]],
    weaker: bool,
) -> None:  # fmt: skip
    key = what.place, what.operation
    tried.add(key)
    if least and key in caught:
        return
    with simulator.without(kernel, what, weaker=weaker):
        for mode in modes:
            kind = outcome(simulator, subject, MODES[mode], want)
            if kind:
                caught.setdefault(key, set()).add(kind)
                if least:
                    return
