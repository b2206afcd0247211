"""The cost study: its count of passes against the networks' own calls, and its rows."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import bench_methods, harness
from benchmarks.bench_methods import CHOICES, PASSES, case, counted_flops, iteration

SIZE: dict[str, Any] = {
    "batch_size": 4, "backbone_options": bench_methods.SMALL.replace("16", "8", 1), "ratio_width": 64,
}  # fmt: skip
SHAPE = (3, 8, 8)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(0, 256, (4, *SHAPE), dtype=torch.uint8), torch.arange(4)


@pytest.mark.parametrize("method", ["DiffRatio, encoder", "score distillation"])
def test_passes_are_those_that_an_iteration_makes(method: str) -> None:
    """Number of images in forward passes of each network, and in backward passes."""
    one = iteration(method, torch.device("cpu"), SHAPE, **SIZE)
    forward: Counter[str] = Counter()
    backward: Counter[str] = Counter()

    def watch(name: str, network: nn.Module) -> None:
        def after(module: nn.Module, inputs: Any, output: torch.Tensor) -> None:
            forward[name] += len(output)
            if output.requires_grad:
                output.register_hook(lambda gradient: backward.update({name: len(gradient)}))

        network.register_forward_hook(after)

    state = one.state
    watch("generator", state.generator)
    watch("student" if state.teacher is not None else "ratio network", state.ratio)
    if state.teacher is not None:
        watch("teacher", state.teacher)
    one.run([batch()])
    found = {name: (forward[name] // 4, backward[name] // 4) for name in forward}
    assert found == PASSES[method]


def test_flops_of_score_distillation_are_the_passes_of_its_networks() -> None:
    """A backward pass to weights and inputs costs two forward passes: the total is made of these."""
    one = iteration("score distillation", torch.device("cpu"), SHAPE, **SIZE)
    records, labels = batch()
    total = counted_flops(lambda: one.run([(records, labels)]))
    x, sigma = torch.randn(4, *SHAPE), torch.full((4,), 0.5)
    denoiser = one.state.ratio
    with torch.no_grad():
        forward = counted_flops(lambda: denoiser(x, sigma, labels))
    passes = sum(ahead + 2 * back for ahead, back in PASSES["score distillation"].values())
    assert total == pytest.approx(passes * forward, rel=0.05)  # first layers need no gradient of their input


def test_case_has_the_cost_of_each_method() -> None:
    settings = harness.Settings(torch.device("cpu"), repeats=1)
    one = case(settings, "tiny", SHAPE, **SIZE)
    one.check()
    rows = harness.measure("methods", one, settings)
    assert [row["provider"] for row in rows] == list(CHOICES)
    flops = {row["provider"]: row["flops"] for row in rows}
    assert flops["DiffRatio, encoder"] < flops["score distillation"]
    assert all(row["peak_bytes"] > 0 and row["images"] == 4 for row in rows)
    assert len(settings.notes) == len(CHOICES)
