"""The cases of the project's kernels: the calls, and the results to compare with.

A case raises ``Failure`` with a report or a wrong result, and otherwise returns a line with its errors.
``quick`` cases run in continuous integration, the others by ``run.py`` and as slow tests.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from ptx import packing, problems
from ptx.operations import (
    Form,
    Objective,
    Outcome,
    Pass,
    add_noise,
    mixer,
    normal,
    pack_weights,
    random_words,
)
from ptx.problems import DIVERGENCES, LARGE, PURPOSES, RNG, SHAPES, SUBSTEP, Problem, Setting
from ptx.simulator import BACKWARD, RANDOM, Failure, Simulator, largest_error, norm_error
from ptx.steps import follow
from torch import Tensor

from diffratio_fast import ops

TOLERANCE = 2e-2
"""Tolerance against the emulation, relative to the largest value: rounding propagates."""
AGAINST_FLOAT64 = 0.15
"""Tolerance relative to the norm of a result: the error of bfloat16 in these networks."""
BF16 = torch.bfloat16
A100 = {"shared_per_block": 163 * 1024, "shared_per_multiprocessor": 164 * 1024}


@dataclass(frozen=True)
class Case:
    name: str
    run: Callable[[Simulator], str]
    options: dict[str, Any] = field(default_factory=dict)
    skewed: bool = False
    quick: bool = False

    def __call__(self, simulator: Simulator) -> str:
        simulator.options(**self.options)
        simulator.skewed = self.skewed
        simulator.library.simulator_clear()
        try:
            return self.run(simulator)
        finally:
            simulator.skewed = False


def described(*parts: object, **options: Any) -> str:
    shown = [str(part).removeprefix("torch.") for part in parts if part != ""]
    return ", ".join([*shown, *(f"{name}={value}" for name, value in options.items())])


# --- the ratio operations --------------------------------------------------------------------------


def call(simulator: Simulator, kind: str, p: Problem, **keywords: Any) -> Outcome:
    """An operation by its launchers; ``keywords`` as of ``operations.mixer``."""
    packed = pack_weights(simulator, p.weights, tuple(p.images[0].shape[1:]))
    noise = RNG, p.index, PURPOSES, SUBSTEP
    flat, e = p.sigma[:, 0], [x[:, 0] for x in p.conditioning]
    arguments: dict[str, Any] = {"packed": packed} | keywords
    if kind == "log_ratio":
        return mixer(
            simulator, p.weights, p.images, flat, e, pass_=Pass.FORWARD, objective=Objective.NONE, **arguments
        )
    if kind == "backward":
        return mixer(
            simulator, p.weights, p.images, flat, e, pass_=Pass.WEIGHTS, objective=Objective.GIVEN,
            upstream=p.upstream[:, 0], want_image=True, **arguments,
        )  # fmt: skip
    arguments["noise"] = noise
    if kind == "score":
        return mixer(
            simulator, p.weights, p.images, p.sigma, p.conditioning, pass_=Pass.IMAGE,
            objective=Objective.SCORE,
            upstream=p.upstream, **arguments,
        )  # fmt: skip
    return mixer(
        simulator, p.weights, p.images, flat, e, pass_=Pass.WEIGHTS, objective=Objective.LOGISTIC, **arguments
    )


_expected: dict[Any, tuple[dict[str, Tensor], dict[str, Tensor]]] = {}


def expected(
    kind: str, p: Problem, divergence: int, noise: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(emulated, float64) results, cached for other launches of the same problem."""
    key = kind, p.setting, divergence, noise
    if key not in _expected:
        if kind == "log_ratio":
            _expected[key] = problems.expected_log_ratio(p, noise)
        elif kind == "backward":
            _expected[key] = problems.expected_backward(p)
        elif kind == "score":
            _expected[key] = problems.expected_score(p, DIVERGENCES[divergence])
        else:
            _expected[key] = problems.expected_loss(p)
    return _expected[key]


def compare(got: dict[str, Tensor], emulated: dict[str, Tensor], exact: dict[str, Tensor]) -> str:
    worst = {"emulation": (0.0, ""), "float64": (0.0, "")}
    for name, b in emulated.items():
        a = got[name].double().reshape(b.shape)
        worst["emulation"] = max(worst["emulation"], (largest_error(a, b), name))
        worst["float64"] = max(worst["float64"], (norm_error(a, exact[name].reshape(b.shape)), name))
    if worst["emulation"][0] >= TOLERANCE or worst["float64"][0] >= AGAINST_FLOAT64:
        raise Failure(f"wrong result: {worst}")
    return "; ".join(f"{error:.1e} of {what} ({name})" for what, (error, name) in worst.items())


def ratio_case(
    kind: str, shape: str, batch: int, draws: int = 1, *, dtype: torch.dtype = torch.float32,
    divergence: int = 0,
    form: Form = Form.SEVERAL, slice_units: int = 0, noise: bool = False, skewed: bool = False,
    quick: bool = False,
    **options: Any,
) -> Case:  # fmt: skip
    setting = Setting(shape, batch, draws, 2 if kind == "loss" else 1, dtype)

    def run(simulator: Simulator) -> str:
        p = Problem(setting)
        keywords: dict[str, Any] = {"form": form, "slice_units": slice_units, "divergence": divergence}
        if noise:
            keywords["noise"] = RNG, p.index, PURPOSES, SUBSTEP
        got = call(simulator, kind, p, **keywords)
        return compare(got.results, *expected(kind, p, divergence, noise)) + f"; {got.launch}"

    name = described(
        kind, shape, f"B={batch}", f"K={draws}", dtype, DIVERGENCES[divergence] if kind == "score" else "",
        form.name.lower() if kind in ("loss", "backward") else "",
        f"slices of {slice_units}" if slice_units else "",
        "noise" if noise else "", "unaligned buffers" if skewed else "", **options,
    )  # fmt: skip
    return Case(name, run, options, skewed, quick)


def schedules() -> Iterator[Case]:
    """Other schedules, early copies, approximations at their worst, coarse tensor cores, more blocks than
    units."""
    for kind, shape, form in (
        ("score", "small", Form.SEVERAL), ("score", "odd", Form.SEVERAL), ("loss", "small", Form.ONE_LAUNCH),
        ("loss", "small", Form.SEVERAL), ("loss", "odd", Form.ONE_LAUNCH), ("loss", "tall", Form.SEVERAL),
        ("loss", "wide", Form.ONE_LAUNCH), ("score", "256, two parts", Form.SEVERAL),
        ("backward", "odd", Form.SEVERAL),
    ):  # fmt: skip
        common: dict[str, Any] = {"form": form, "slice_units": 0 if kind == "score" else 3}
        yield ratio_case(kind, shape, 3, **common, schedule=BACKWARD)
        yield ratio_case(kind, shape, 3, **common, schedule=RANDOM, seed=7)
        yield ratio_case(
            kind, shape, 3, **common, schedule=RANDOM, seed=8, late_copies=False, multiprocessors=5
        )
        yield ratio_case(kind, shape, 3, **common, coarse_sums=True)
        yield ratio_case(kind, shape, 3, **common, approximate=True)


def many_blocks() -> Iterator[Case]:
    """Several copies of the sums, some of them without units; two blocks on a multiprocessor."""
    for shape in ("small", "odd", "tall", "wide", "16 tokens"):
        for form in (Form.SEVERAL, Form.ONE_LAUNCH):
            yield ratio_case("loss", shape, 5, form=form, slice_units=8, multiprocessors=24)
    yield ratio_case("loss", "256", 3, slice_units=4, multiprocessors=24)
    random: dict[str, Any] = {"schedule": RANDOM, "seed": 11}
    yield ratio_case(
        "loss", "small", 5, form=Form.ONE_LAUNCH, slice_units=8, multiprocessors=13, most_blocks=2, **random
    )
    yield ratio_case("score", "small", 7, 2, multiprocessors=2, most_blocks=3, **random)


def realistic() -> Iterator[Case]:
    for shape in ("CIFAR-10", "128 tokens"):
        yield ratio_case("log_ratio", shape, 2)
        yield ratio_case("score", shape, 2)
        yield ratio_case("loss", shape, 1, form=Form.ONE_LAUNCH)
        yield ratio_case("loss", shape, 1)
        yield ratio_case("backward", shape, 2)
    random: dict[str, Any] = {"schedule": RANDOM, "seed": 3}
    yield ratio_case("loss", "CIFAR-10", 2, form=Form.ONE_LAUNCH, dtype=BF16, multiprocessors=3, **random)
    yield ratio_case("loss", "CIFAR-10", 4, form=Form.AUTOMATIC, multiprocessors=12)
    yield ratio_case("loss", "CIFAR-10", 1, form=Form.AUTOMATIC, **A100)
    yield ratio_case("score", "CIFAR-10", 1, **A100)
    yield ratio_case("loss", "fashion", 4, form=Form.AUTOMATIC, multiprocessors=24)
    yield ratio_case("score", "CIFAR-10", 2, 2, dtype=BF16, schedule=BACKWARD)
    yield ratio_case("score", "256, 128 tokens", 2)
    yield ratio_case("score", "256, 256 tokens", 1)
    yield ratio_case("loss", "256, 256 tokens", 1)
    yield ratio_case("loss", "256, 128 tokens", 1)


def ratio_cases() -> Iterator[Case]:
    small = [shape for shape in SHAPES if shape not in (*LARGE, "fashion")]
    quick = ("odd", "wide", "256, two parts")
    for shape in small:
        yield ratio_case("log_ratio", shape, 3, noise=True, quick=shape == "tall")
        yield ratio_case("score", shape, 3, 2, quick=shape in quick)
    yield ratio_case("log_ratio", "small", 3, dtype=BF16)
    for divergence in range(1, len(DIVERGENCES)):
        yield ratio_case("score", "odd", 5, 3, divergence=divergence)
    yield ratio_case("score", "small", 4, 2, dtype=BF16)
    for shape in [shape for shape in small if not shape.startswith("256")]:
        for form in (Form.SEVERAL, Form.ONE_LAUNCH):
            yield ratio_case("loss", shape, 3, form=form, slice_units=4, quick=shape in quick)
        yield ratio_case("backward", shape, 3, slice_units=2, quick=shape == "odd")
    for shape in ("256", "256, two parts"):
        yield ratio_case("loss", shape, 2, slice_units=3)
        yield ratio_case("backward", shape, 2)
    yield ratio_case("loss", "small", 3, dtype=BF16)
    yield ratio_case("loss", "odd", 3, form=Form.ONE_LAUNCH, dtype=BF16)
    yield ratio_case("loss", "fashion", 3, form=Form.AUTOMATIC)
    for shape, dtype in itertools.product(("odd", "wide", "256, two parts"), (torch.float32, BF16)):
        yield ratio_case("score", shape, 3, 2, dtype=dtype, skewed=True)
        yield ratio_case("loss", shape, 2, dtype=dtype, form=Form.AUTOMATIC, skewed=True)
    yield from many_blocks()
    yield from schedules()
    yield from realistic()


# --- steps, packing, NaN ---------------------------------------------------------------------------


def step_cases() -> Iterator[Case]:
    def case(
        shape: str,
        batch: int,
        dtype: torch.dtype,
        form: Form,
        objective: Objective,
        quick: bool = False,
        **o: Any,
    ) -> Case:
        setting = Setting(shape, batch, 1, 2 if objective is Objective.LOGISTIC else 1, dtype, seed=3)
        name = described("steps", shape, f"B={batch}", dtype, objective.name.lower(), form.name.lower(), **o)
        return Case(name, lambda simulator: follow(simulator, setting, form, objective), o, quick=quick)

    for shape in SHAPES:
        one = Form.SEVERAL if shape.startswith("256") else Form.ONE_LAUNCH
        quick = shape in ("odd", "129 tokens")
        batch = 1 if shape in LARGE else 3
        yield case(shape, batch, torch.float32, Form.SEVERAL, Objective.GIVEN, quick)
        yield case(shape, min(batch, 2), torch.float32, one, Objective.LOGISTIC, quick)
        if shape not in LARGE:
            yield case(shape, 4, torch.float32, Form.SEVERAL, Objective.LOGISTIC, multiprocessors=24)
            yield case(shape, 2, BF16, Form.AUTOMATIC, Objective.GIVEN, schedule=RANDOM, seed=5)


def packing_cases() -> Iterator[Case]:
    def case(shape: str, dtype: torch.dtype) -> Case:
        def run(simulator: Simulator) -> str:
            p = Problem(Setting(shape, 1, dtype=dtype))
            packing.check_packed(pack_weights(simulator, p.weights, tuple(p.images[0].shape[1:])), p)
            return "every element in its fragment"

        return Case(described("pack_weights", shape, dtype), run, quick=shape in ("odd", "256, two parts"))

    for shape, dtype in itertools.product(SHAPES, (torch.float32, BF16)):
        yield case(shape, dtype)


def nan_cases() -> Iterator[Case]:
    """A sample whose sigma is NaN becomes NaN, and the samples that its block takes after it keep their
    bits."""

    def case(shape: str, draws: int) -> Case:
        def run(simulator: Simulator) -> str:
            p = Problem(Setting(shape, 4, draws, seed=3))
            want = call(simulator, "score", p).results
            p.sigma = p.sigma.clone()
            p.sigma[0] = p.sigma[2] = float("nan")
            got = call(simulator, "score", p).results
            ratios = [r["log_ratio"].reshape(4, draws) for r in (want, got)]
            same = torch.equal(ratios[0][[1, 3]], ratios[1][[1, 3]])
            same = same and torch.equal(want["image"][[1, 3]], got["image"][[1, 3]])
            if not same or not ratios[1][[0, 2]].isnan().all() or not got["image"][[0, 2]].isnan().all():
                raise Failure("wrong result: NaN reaches another sample, or is lost")
            return "stays in its sample"

        name = described("nan", shape, f"K={draws}")
        return Case(name, run, {"multiprocessors": 1}, quick=shape == "odd" and draws == 2)

    for shape, draws in itertools.product(
        ("small", "odd", "129 tokens", "wide", "patch 8", "256", "256, two parts"), (1, 2)
    ):
        yield case(shape, draws)


# --- noise: bit for bit ----------------------------------------------------------------------------


def noise_cases() -> Iterator[Case]:
    index = torch.tensor([0x1FFFFFFF0 + 3 * i for i in range(3)])
    stream = 5, 2, 9  # purpose, substep, draw

    def same_bits(a: Tensor, b: Tensor) -> str:
        if not torch.equal(a.view(torch.uint8), b.view(torch.uint8)):
            raise Failure("wrong result: other bits than on the CPU")
        return "the bits of the CPU"

    def words(count: int) -> Callable[[Simulator], str]:
        want = ops.random_words(RNG, index, stream[0], count, substep=stream[1], draw=stream[2])
        return lambda simulator: same_bits(random_words(simulator, RNG, index, count, *stream), want)

    def normals(count: int) -> Callable[[Simulator], str]:
        want = ops.normal(RNG, index, (count,), stream[0], substep=stream[1], draw=stream[2])
        return lambda simulator: same_bits(normal(simulator, RNG, index, count, *stream), want)

    def noising(
        source: torch.dtype, target: torch.dtype, size: int, inputs: int, scaled: bool, offset: int,
        shared: bool = False,
    ) -> Callable[[Simulator], str]:  # fmt: skip
        def run(simulator: Simulator) -> str:
            generator = torch.Generator().manual_seed(size)
            x = [
                torch.randn(3, size, generator=generator, dtype=torch.float64).to(source)
                for _ in range(inputs)
            ]
            wide = torch.float64 if source == torch.float64 else torch.float32
            sigma = torch.rand(3, generator=generator).to(wide) * 3
            scale = torch.rand(3, generator=generator).to(wide) if scaled else None
            purposes = (1,) * inputs if shared else tuple(range(1, inputs + 1))
            got = add_noise(simulator, x, sigma, RNG, index, purposes, 1, 7, scale, target, offset)
            want = ops.add_noise(
                tuple(x), sigma, RNG, index, purposes, substep=1, draw=7, scale=scale, dtype=target
            )
            return same_bits(got, want)

        return run

    for count in (1, 3, 4, 7, 1024, 5001):
        yield Case(f"random_words {count}", words(count), quick=count == 7)
        yield Case(f"normal {count}", normals(count), quick=count == 1024)
    floats = (torch.float32, BF16, torch.float16)
    types = [*itertools.product(floats, floats), (torch.float64, torch.float64)]
    sizes = ((8, 1, False, 0), (3 * 32 * 32, 2, True, 0), (61, 8, True, 0), (64, 1, True, 1))
    for (source, target), (size, inputs, scaled, offset) in itertools.product(types, sizes):
        name = described(
            "add_noise", source, f"to {target}".replace("torch.", ""), f"{inputs} x {size}",
            "scaled" if scaled else "", "unaligned" if offset else "",
        )  # fmt: skip
        run = noising(source, target, size, inputs, scaled, offset)
        yield Case(name, run, quick=size in (61, 64))
    for (source, target), size in itertools.product(types, (61, 3 * 32 * 32)):
        name = described("add_noise", source, f"to {target}".replace("torch.", ""), f"shared by 2 x {size}")
        yield Case(name, noising(source, target, size, 2, True, 0, shared=True), quick=size == 61)


def all_cases() -> list[Case]:
    return [*noise_cases(), *packing_cases(), *nan_cases(), *step_cases(), *ratio_cases()]
