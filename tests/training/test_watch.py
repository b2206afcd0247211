"""Warnings: bad steps are counted exactly, each warning is printed once, and bad steps can stop a run."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import SMALL, one_error_line, run

from diffratio_fast import train
from diffratio_fast.report.diagnosis import warnings
from diffratio_fast.training import generator_run
from diffratio_fast.training.state.watch import (
    DEVIATIONS,
    HORIZON,
    LEARNING,
    BadSteps,
    Watch,
    Watched,
    initial_bad_steps,
    initial_statistics,
)

CPU = torch.device("cpu")


def watch_of(*jumps: float) -> Watch:
    return Watch(
        [Watched(str(i), jump) for i, jump in enumerate(jumps)],
        initial_statistics(len(jumps), CPU),
        initial_bad_steps(CPU),
    )


def note(watch: Watch, *values: float) -> None:
    watch.note([torch.tensor(value, dtype=torch.float64) for value in values])


def test_mean_and_variance_are_those_of_the_formula() -> None:
    """Against a plain loop in float64: rates 1/n up to the horizon, jumps clipped at their limit."""
    random = np.random.default_rng(0)
    values = random.normal(10, 1, 400)
    values[[150, 151, 300]] = 100.0
    watch = watch_of(0.5)
    mean = variance = 0.0
    bad = []
    for i, value in enumerate(values):
        limit = mean + max(DEVIATIONS * np.sqrt(variance), 0.5 * abs(mean))
        jumped = bool(value > limit and i >= LEARNING)
        bad.append(jumped)
        rate = 1 / HORIZON if jumped else max(1 / (i + 1), 1 / HORIZON)
        step = (limit if jumped else value) - mean
        variance = variance if jumped else (1 - rate) * (variance + rate * step**2)
        mean += rate * step
        note(watch, value)
    assert np.flatnonzero(bad).tolist() == [150, 151, 300]
    np.testing.assert_allclose(watch.statistics[0].numpy(), [mean, variance, 400], rtol=1e-12)
    assert watch.take() == BadSteps(3, 2)


def test_bad_steps_are_counted_between_log_lines_and_in_a_row_across_them() -> None:
    watch = watch_of(0.5, 9.0)
    for _ in range(LEARNING):
        note(watch, 1.0, 1.0)
    assert watch.take() == (0, 0)
    note(watch, 1.0, 9.0)  # a gradient may be nine times its mean
    assert watch.take() == (0, 0)
    note(watch, 2.0, 1.0)
    note(watch, 1.0, 100.0)
    assert watch.take() == (2, 2)
    note(watch, float("nan"), 1.0)
    assert watch.take() == (1, 3)  # consecutive since the previous line
    note(watch, 1.0, 1.0)
    assert watch.take() == (0, 3)
    assert watch.take() == (0, 0)
    assert watch.statistics.isfinite().all()


def test_what_is_lasting_becomes_usual() -> None:
    watch = watch_of(0.5)
    for _ in range(LEARNING):
        note(watch, 1.0)
    for _ in range(1000):
        note(watch, 5.0)
    assert 100 < watch.take().longest < 1000
    note(watch, 5.0)
    assert watch.take() == (0, 0)


def test_fewer_numbers_leave_the_others_alone() -> None:
    watch = watch_of(0.5, 0.5)
    note(watch, 1.0)
    assert watch.statistics[:, 2].tolist() == [1, 0]


# ------------------------------------------------------------------------------------ warnings


def lines(count: int, **last: Any) -> list[dict[str, Any]]:
    """Log lines of an ordinary run; the last five have the metrics ``last`` instead."""
    usual = {
        "images_per_second": 100.0, "loader_share": 0.01, "ratio_accuracy": 0.6, "log_ratio_real": 0.3,
        "log_ratio_fake": -0.3, "bad_steps": 0,
    }  # fmt: skip
    found = [{"step": 10 * i, "seconds": 10.0 * i, **usual} for i in range(1, count + 1)]
    return [*found[:-5], *(line | last for line in found[-5:])]


@pytest.mark.parametrize(
    ("history", "kind", "words"),
    [
        (lines(20), None, ""),
        (lines(20, bad_steps=3), "spike", "3 of the 10 steps up to step 200"),
        (lines(20, ratio_accuracy=0.995), "saturated", "since step 160"),
        (lines(20, log_ratio_real=20.0, log_ratio_fake=-25.0), "saturated", "fakes -25.0"),
        (lines(20, loader_share=0.5), "loader", "50% of the time"),
        (lines(20, images_per_second=50.0), "slower", "at most 50 images a second since step 160, 100"),
        (lines(20, images_per_second=70.0), None, ""),
        (lines(5, images_per_second=50.0), None, ""),  # no baseline
        ([line | {"seconds": line["seconds"] / 100} for line in lines(20, loader_share=0.9)], None, ""),
        (lines(19, loader_share=0.5)[:-1] + lines(19)[-1:], None, ""),  # it has recovered
        (lines(20, images_per_second=None, ratio_accuracy=None, log_ratio_real=None), None, ""),
    ],
)  # fmt: skip
def test_what_log_lines_warn_of(history: list[dict[str, Any]], kind: str | None, words: str) -> None:
    found = dict(warnings(history))
    assert list(found) == ([] if kind is None else [kind])
    assert kind is None or words in found[kind]


def test_the_warm_up_is_no_yardstick() -> None:
    history = lines(20, images_per_second=50.0, ratio_accuracy=0.999)
    assert warnings(history, after=150) == [("saturated", dict(warnings(history))["saturated"])]
    assert warnings(history, after=160) == []


def options(run_dir: Path, *more: object) -> list[str]:
    return [*SMALL, "--run-dir", str(run_dir), *map(str, more)]


@pytest.fixture
def spike(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Multiplies the ratio network's real images in the given steps, and thereby the loss."""

    def at(*steps: int) -> None:
        advance = generator_run.Trainer.advance

        def spiked(self: generator_run.Trainer, batches: list[Any]) -> None:
            values = self.state.ratio.state_dict()
            before = {name: value.clone() for name, value in values.items()}
            if self.state.step in steps:
                with torch.no_grad():
                    for value in values.values():
                        value.mul_(30)
            advance(self, batches)
            if self.state.step - 1 in steps:
                self.state.ratio.load_state_dict(before)

        monkeypatch.setattr(generator_run.Trainer, "advance", spiked)

    return at


def test_a_spike_is_reported_once_and_counted(
    spike: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spike(25, 26, 33)
    threads = torch.get_num_threads()
    assert train.main(options(tmp_path / "run", "--steps", 40)) == 0
    torch.set_num_threads(threads)
    logged = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    counts = {line["step"]: line["bad_steps"] for line in logged if "bad_steps" in line}
    assert counts[28] == 2 and counts[36] == 1 and sum(counts.values()) == 3
    printed = capsys.readouterr().out
    assert printed.count("2 of the 4 steps up to step 28 were bad") == 1
    assert printed.count("1 of the 4 steps up to step 36 were bad") == 1  # again, after it had ended
    assert printed.count("were bad") == 2


def test_a_run_stops_after_so_many_bad_steps(spike: Any, tmp_path: Path) -> None:
    spike(25, 27, 28, 29)
    threads = torch.get_num_threads()
    from diffratio_fast.errors import UserError

    with pytest.raises(UserError, match=r"training stopped: 3 steps in a row up to about step 32") as caught:
        train.main(options(tmp_path / "run", "--steps", 60, "--stop-after-bad-steps", 3))
    assert "state.safetensors" in str(caught.value) or "checkpoint" in str(caught.value)
    assert (tmp_path / "run" / "checkpoint").exists()
    assert train.main(options(tmp_path / "more", "--steps", 36, "--stop-after-bad-steps", 4)) == 0
    torch.set_num_threads(threads)


def test_the_option_is_checked(tmp_path: Path) -> None:
    line = one_error_line(run("train", *SMALL, "--stop-after-bad-steps", 0, cwd=tmp_path))
    assert "--stop-after-bad-steps must be at least 1" in line
