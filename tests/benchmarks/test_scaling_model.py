"""The scaling model: its formulas in closed cases, and its memory against plans of other sizes."""

import json
from dataclasses import replace

import pytest

from benchmarks.scaling_model import (
    TINY,
    Machine,
    Work,
    hidden_up_to,
    largest_pass,
    predict,
    ring,
    summary,
    table,
    work_of,
)  # fmt: skip
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.training.memory import cost

MACHINE = Machine(
    flops=1e12, utilization=0.5, memory=10e9, per_node=8, inside=1e9, between=1e8, latency=0.0, overhead=0.1,
    hidden=0.0,
)  # fmt: skip
WORK = Work(
    batch=64, flops=1e12, flops_in_parts=1.5e12, state=4e9, gradients=1e9, record_bytes=100, fixed=6e9,
    per_image=1e8,
)  # fmt: skip


def test_a_ring_sends_almost_twice_the_gradients_over_its_slowest_link() -> None:
    assert ring(1e9, 1, MACHINE) == 0
    assert ring(1e9, 2, MACHINE) == pytest.approx(2 * 0.5)
    assert ring(1e9, 8, MACHINE) == pytest.approx(2 * 7 / 8)
    assert ring(1e9, 16, MACHINE) == pytest.approx(2 * 15 / 16 * 10)
    assert ring(0, 5, replace(MACHINE, latency=0.01)) == pytest.approx(2 * 4 * 0.01)


def test_predictions_by_hand() -> None:
    row = predict(WORK, 8, MACHINE, sharded=False)
    assert row is not None
    assert row["local_batch"] == row["images_in_a_pass"] == 8
    assert row["computing_s"] == pytest.approx(64e12 / 8 / 0.5e12)
    assert row["exchange_s"] == pytest.approx(2 * 7 / 8)
    assert row["step_s"] == pytest.approx(16 + 1.75 + 0.1)
    assert row["memory_bytes"] == pytest.approx(6e9 + 8 * 1e8)
    assert row["efficiency"] == pytest.approx(16 / 17.85)
    assert row["save_write_s"] == pytest.approx(4e9 / MACHINE.disk)

    sharded = predict(WORK, 8, MACHINE, sharded=True)
    assert sharded is not None
    assert sharded["memory_bytes"] == pytest.approx(6.8e9 - 5e9 * 7 / 8)
    assert sharded["exchange_s"] == pytest.approx(3 * 7 / 8)  # gradients once, weights twice

    hidden = predict(WORK, 8, replace(MACHINE, hidden=0.5), sharded=False)
    assert hidden is not None and hidden["step_s"] == pytest.approx(16.1)
    assert predict(WORK, 128, MACHINE, sharded=False) is None  # fewer images than GPUs
    assert predict(replace(WORK, fixed=20e9), 8, MACHINE, sharded=False) is None
    parted = predict(replace(WORK, per_image=0.5e9), 8, MACHINE, sharded=False)
    assert parted is not None and parted["images_in_a_pass"] == 4
    assert parted["computing_s"] == pytest.approx(8 * 1.5e12 / 0.5e12)
    assert largest_pass(WORK, 48, 6e9 + 40e8) == 32
    assert largest_pass(WORK, 48, 6e9 + 48e8) == 48


def test_the_table_has_a_row_for_each() -> None:
    rows = [row for count in (8, 16) if (row := predict(WORK, count, MACHINE, sharded=False)) is not None]
    lines = table(rows, steps=86400).splitlines()
    assert len(lines) == 2 + len(rows) and lines[2].startswith("| 8 | ddp | 8 (8) | 16000 | 1750 | 17850 |")
    assert json.dumps(rows)


def test_the_exchange_hides_up_to_so_many_gpus() -> None:
    machine = replace(MACHINE, hidden=0.5)  # between nodes 2 (N - 1) / N * 10 s against B / N s
    assert hidden_up_to(1e12, 1e9, 64, machine) == 8
    assert hidden_up_to(1e12, 1e9, 640, machine) == 32  # 19.375 against 20; at 40 19.5 against 16
    found = summary(Machine()).splitlines()
    assert len(found) == 2 + 9 and found[2].startswith("| `cifar10` (256) | 241 | 0.31 | 22, 11 | 2, 14 |")


@pytest.mark.slow
def test_memory_is_linear_in_the_images_of_a_pass() -> None:
    config = TrainConfig(**TINY, batch_size=64)
    data = open_dataset("digits")
    work = work_of(config, data)
    planned = cost(config, data)
    assert work.peak(64) == pytest.approx(planned.peak, rel=0.03)
    assert work.flops == pytest.approx(planned.flops / 64, rel=0.01)
    assert work.flops < work.flops_in_parts < 1.5 * work.flops
