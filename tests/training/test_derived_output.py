"""Reports, metrics, pictures and events never end training: on a full, read-only or broken disk."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.faulty_files import Refusing, fill, small_disk
from support.helpers import SMALL

from diffratio_fast import train
from diffratio_fast.runs.log import MetricsLog
from diffratio_fast.runs.loggers import Loggers
from diffratio_fast.training.run import Run

OPTIONS = [*SMALL, "--steps", "12", "--log-every", "1", "--eval-every", "3", "--checkpoint-every", "3"]
DERIVED = ("report.html", "metrics.jsonl", "samples", "step-0", "tfevents", "snapshots", "measurements.json")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    where = tmp_path_factory.mktemp("undisturbed") / "run"
    assert train.main([*OPTIONS, "--run-dir", str(where)]) == 0
    return load_file(where / "generator.safetensors")


def at_steps(monkeypatch: pytest.MonkeyPatch, actions: dict[int, object]) -> None:
    """Call the entry of ``actions`` for a step before that step."""
    advance = Run.advance

    def wrapped(self: Run, batches: object) -> None:
        action = actions.get(self.state.step)
        if callable(action):
            action()
        advance(self, batches)  # type: ignore[arg-type]

    monkeypatch.setattr(Run, "advance", wrapped)


def steps_logged(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "ratio_loss" in line]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_full_disk_that_is_emptied_again(
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with small_disk(tmp_path / "disk", "2m") as disk:
        at_steps(monkeypatch, {4: lambda: fill(disk), 10: (disk / "filler").unlink})
        run = disk / "run"
        assert train.main([*OPTIONS, "--run-dir", str(run)]) == 0
        printed = capsys.readouterr().out
        for name in ("metrics.jsonl", "report.html", "a sample grid", "TensorBoard's events"):
            assert printed.count(f"warning: {name} cannot be written now (") == 1, printed
            assert f"{name}: written again" in printed
        assert "warning: the checkpoint of step" in printed and "is kept" in printed
        assert steps_logged(run) == list(range(1, 13))
        assert (run / "summary.json").exists() and (run / "report.html").exists()
        assert same(load_file(run / "generator.safetensors"), undisturbed)


@pytest.mark.parametrize(
    "number", [errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES], ids=lambda number: errno.errorcode[number]
)
def test_errors_of_every_kind(
    number: int,
    undisturbed: dict[str, torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    faults = Refusing(*DERIVED).install(monkeypatch)
    at_steps(monkeypatch, {2: lambda: setattr(faults, "number", number)})
    run = tmp_path / "run"
    assert train.main([*OPTIONS, "--run-dir", str(run)]) == 0
    faults.number = 0
    printed = capsys.readouterr().out
    assert faults.refused > 10
    assert printed.count(f"warning: metrics.jsonl cannot be written now ({os.strerror(number)})") == 1, (
        printed
    )
    assert "warning: a sample grid" in printed and "warning: report.html" in printed
    assert json.loads((run / "summary.json").read_text())["steps"] == 12
    assert same(load_file(run / "generator.safetensors"), undisturbed)


def test_lines_and_events_are_kept_and_written_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    printed: list[str] = []
    faults = Refusing("metrics.jsonl", "tfevents").install(monkeypatch)
    log = MetricsLog(tmp_path / "metrics.jsonl", 0, printed.append)
    events = Loggers(["tensorboard"], tmp_path, 0, config={}, levels={}, say=printed.append)
    for step in range(1, 7):
        faults.number = errno.ENOSPC if step in (2, 3, 5) else 0
        log.write({"step": step, "loss": 1.0})
        events.line({"step": step, "loss": 1.0})
    log.close()
    events.close()
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]
    (file,) = tmp_path.glob("events.out.tfevents.*")
    found = EventAccumulator(str(file)).Reload()
    assert [event.step for event in found.Scalars("loss/loss")] == [1, 2, 3, 4, 5, 6]
    assert sum("cannot be written" in line for line in printed) == 4
    assert sum("written again" in line for line in printed) == 4


def test_a_log_that_cannot_be_read_is_only_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    os.mkfifo(path)  # would block a reader
    printed: list[str] = []
    log = MetricsLog(path, 3, printed.append)
    log.write({"step": 4})
    log.close()
    assert log.lines == [{"step": 4}] and "not a regular file" in printed[0]
