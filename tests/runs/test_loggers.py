"""Loggers: the records of each, also after a resume; their failures never end a run."""

from __future__ import annotations

import csv
import io
import math
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from support.helpers import SMALL

from diffratio_fast import train
from diffratio_fast.errors import UserError
from diffratio_fast.runs import loggers
from diffratio_fast.runs.loggers import Loggers, named_scalars, parse_loggers

LEVELS = {"sigma": [0.04, 1.5], "generator_sigma": [0.1, 2.0]}


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (7, 9)).save(stream, "PNG")
    return stream.getvalue()


def opened(names: list[str], root: Path, step: int = 0, **more: Any) -> tuple[Loggers, list[str]]:
    printed: list[str] = []
    made = Loggers(names, root, step, config={"seed": 3}, levels=LEVELS, say=printed.append, **more)
    return made, printed


def test_numbers_are_grouped_and_named_by_sigma() -> None:
    line = {
        "step": 5, "ratio_loss": 1.5, "divergence": 0.1, "images": 320, "frechet_distance_validation": 3.0,
        "divergence_by_sigma": [0.2, None], "generator_gradient_share": [0.25, 0.75], "features": "x",
        "gradient_norm": math.inf, "unknown": 2, "three": [1.0, 2.0, 3.0],
    }  # fmt: skip
    assert named_scalars(line, LEVELS) == {
        "loss/ratio_loss": 1.5, "divergence/divergence": 0.1, "speed/images": 320,
        "quality/frechet_distance_validation": 3.0, "divergence_by_sigma/sigma 0.04": 0.2,
        "generator_gradient_share/sigma 0.1": 0.25, "generator_gradient_share/sigma 2": 0.75,
        "other/unknown": 2, "three/0": 1.0, "three/1": 2.0, "three/2": 3.0,
    }  # fmt: skip
    assert list(named_scalars({"step": 1, "sigma": [7.0], "a_by_sigma": [1.0]}, {})) == ["a_by_sigma/sigma 7"]


def test_tensorboard_has_what_was_logged_and_forgets_what_was_undone(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    first, _ = opened(["tensorboard"], tmp_path)
    for step in (10, 20, 30):
        first.line({"step": step, "loss": float(step), "by_sigma": [1.0, None], "none": None})
    first.close()
    resumed, printed = opened(["tensorboard"], tmp_path, 20)
    resumed.line({"step": 30, "loss": 31.0})
    resumed.picture("samples", png(), 30)
    resumed.close()
    read = accumulator.EventAccumulator(str(tmp_path))
    read.Reload()
    assert [(e.step, e.value) for e in read.Scalars("loss/loss")] == [(10, 10.0), (20, 20.0), (30, 31.0)]
    assert [e.value for e in read.Scalars("by_sigma/sigma 0.04")] == [1.0, 1.0]
    image = read.Images("samples")[0]
    assert (image.width, image.height) == (7, 9) and not printed


def test_csv_has_a_row_for_each_number(tmp_path: Path) -> None:
    first, _ = opened(["csv"], tmp_path)
    for step in (10, 20, 30):
        first.line({"step": step, "loss": step / 3})
    first.close()
    with (tmp_path / "metrics.csv").open("a") as file:
        file.write("30,lo")  # truncated by a kill
    resumed, _ = opened(["csv"], tmp_path, 20)
    resumed.line({"step": 30, "loss": 31.0})
    resumed.close()
    with (tmp_path / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), r["name"], float(r["value"])) for r in rows] == [
        (10, "loss/loss", 10 / 3), (20, "loss/loss", 20 / 3), (30, "loss/loss", 31.0)
    ]  # fmt: skip


class StandIn:
    """The part of wandb that is used."""

    def __init__(self) -> None:
        self.started: list[dict[str, Any]] = []
        self.logged: list[tuple[dict[str, Any], int]] = []
        self.finished = 0

    def module(self) -> types.ModuleType:
        module = types.ModuleType("wandb")
        module.init = lambda **keywords: (self.started.append(keywords), self)[1]  # type: ignore[attr-defined]
        module.Image = lambda picture: picture.size  # type: ignore[attr-defined]
        return module

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((values, step))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", stand_in.module())
    for step in (0, 5):
        made, printed = opened(["wandb"], tmp_path, step)
        made.line({"step": step + 1, "loss": 2.0})
        made.picture("samples", png(), step + 1)
        made.close()
    assert not printed and stand_in.finished == 2
    assert stand_in.started[0]["id"] == stand_in.started[1]["id"] and stand_in.started[0]["config"] == {
        "seed": 3
    }
    assert stand_in.logged[:2] == [({"loss/loss": 2.0}, 1), ({"samples": (7, 9)}, 1)]


# ----------------------------------------------------------------------------------------- failures


def test_a_logger_that_fails_is_reported_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(loggers.CsvFile):
        def scalars(self, values: dict[str, float], step: int) -> None:
            raise OSError("disk full\nreally")

    def cannot_start(*_: object) -> loggers.Logger:
        raise RuntimeError("no network")

    monkeypatch.setitem(loggers.LOGGERS, "csv", Broken)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", cannot_start)
    made, printed = opened(["csv", "wandb", "tensorboard"], tmp_path)
    for step in (1, 2):
        made.line({"step": step, "loss": 1.0})
    made.close()
    assert printed == [
        "warning: no log for wandb: no network", "warning: the log for csv ends here: disk full really"
    ]  # fmt: skip


def test_one_that_is_not_installed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert opened(["wandb"], tmp_path)[1] == [
        "warning: no log for wandb: it is not installed (pip install wandb)"
    ]


def test_names_are_checked_before_anything_starts(tmp_path: Path) -> None:
    assert parse_loggers("csv, tensorboard,csv") == ["csv", "tensorboard"] and parse_loggers("none") == []
    with pytest.raises(UserError, match="no such logger: tensorbord"):
        train.main([*SMALL, "--logger", "tensorbord", "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_a_run_writes_the_loggers_that_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    options = [*SMALL, "--steps", "4", "--run-dir", str(tmp_path / "run")]
    assert train.main([*options, "--logger", "csv,wandb"]) == 0
    run = tmp_path / "run"
    names = {row.split(",")[1] for row in (run / "metrics.csv").read_text().splitlines()[1:]}
    assert {"loss/ratio_loss", "divergence/divergence", "speed/seconds"} <= names
    assert any(name.startswith("divergence_by_sigma/sigma 0.0") for name in names)
    assert not list(run.glob("events*")) and (run / "summary.json").exists()
    assert train.main([*options, "--fresh", "--logger", "none"]) == 0
    assert not (run / "metrics.csv").exists() and not list(run.glob("events*"))
