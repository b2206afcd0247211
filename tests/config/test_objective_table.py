"""The table of objectives: a new objective is one module and one row."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import SMALL
from torch import Tensor

from diffratio_fast import train
from diffratio_fast.config.objectives import OBJECTIVES, Objective
from diffratio_fast.config.presets import PRESETS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.errors import UserError
from diffratio_fast.objectives.diffratio import RatioLoss, ScoreDifference
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.monitor import Evaluation
from diffratio_fast.training.step.generator import Iteration

CENTER = 0.25


class ToTheCenter(Iteration):
    """An objective that needs no online network: the generator descends |x0 - CENTER|^2 / 2."""

    def online_loss(
        self, real: Tensor, fake: Tensor, labels: Tensor, index: Tensor, substep: int
    ) -> RatioLoss:
        loss = sum((p.square().sum() for p in self.state.ratio.parameters()), real.new_zeros(()))
        return RatioLoss(loss, *(real.new_zeros(len(real)) for _ in range(2)))

    def generator_direction(
        self, fake: Tensor, labels: Tensor, index: Tensor
    ) -> tuple[ScoreDifference, Tensor | None]:
        zeros = fake.new_zeros(len(fake), 1)
        return ScoreDifference(fake.detach() - CENTER, zeros, zeros.bool(), zeros + 1), None


class Distance(Evaluation):
    def running(self, mean: dict[str, float]) -> dict[str, Any]:
        return {"weight_decay_loss": mean["ratio_loss"]}

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        return {}

    def loss_by_sigma(self) -> tuple[dict[str, Any], None]:
        return {"sigma": [1.0]}, None

    def refitted(self, steps: int) -> None:
        return None

    def calibrations(self, fitted: Any) -> dict[str, list[dict[str, Any]]]:
        return {}


ROW = Objective(
    title="to the center, rate {generator_lr}",
    step=f"{__name__}:ToTheCenter",
    monitor=f"{__name__}:Distance",
    label="nothing",
    has_ratio=False,
    preset={"generator_lr": 3e-3, "ratio_weight_decay": 0.0},
    requires={"normalize_h": False},
    options=("noise_draws",),
)


@pytest.fixture
def center(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "center", ROW)


@pytest.mark.usefixtures("center")
def test_a_registered_objective_trains_and_resumes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    argv = ["digits", *SMALL, "--objective", "center", "--run-dir", str(folder)]
    assert train.main([*argv, "--dry-run"]) == 0
    assert "to the center, rate 0.003" in capsys.readouterr().out
    for steps in ("3", "6"):
        assert train.main([*argv, "--steps", steps]) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["steps"] == 6 and "divergence" not in summary
    assert not (folder / "ratio.safetensors").exists()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert any("weight_decay_loss" in line for line in lines)


@pytest.mark.usefixtures("center")
def test_a_registered_objective_moves_the_generator() -> None:
    config = TrainConfig(**{**PRESETS["digits"], **ROW.preset, "objective": "center", "batch_size": 16})
    dataset = open_dataset("digits")
    iteration = Trainer.new_iteration(config, dataset, torch.device("cpu"))
    before, batches = _distance(iteration), dataset.batches("train", 16, seed=0)
    for _ in range(200):
        iteration.run([next(batches)])
    assert _distance(iteration) < before / 2


@torch.no_grad()
def _distance(iteration: Iteration) -> float:
    generator = iteration.state.generator
    latents = torch.randn(64, *generator.latent_shape, generator=torch.Generator().manual_seed(0))
    images = generator(latents, torch.arange(64) % 10)
    return float((images - CENTER).square().mean())


@pytest.mark.usefixtures("center")
def test_a_row_checks_options() -> None:
    with pytest.raises(UserError, match="--normalize-h False, not True"):
        TrainConfig(objective="center", normalize_h=True)
    with pytest.raises(UserError, match="--noise-draws is an option of --objective center only"):
        TrainConfig(noise_draws=2)
    assert TrainConfig(objective="center", noise_draws=2).noise_draws == 2


def test_rows_name_what_exists() -> None:
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for row in OBJECTIVES.values():
        assert issubclass(row.load("step"), Iteration) and issubclass(row.load("monitor"), Evaluation)
        assert callable(row.load("network"))
        assert {*row.preset, *row.options, *row.requires} <= fields
        row.title.format(**{name: TrainConfig.default(name) for name in fields})


def test_no_other_module_asks_for_an_objective_by_name() -> None:
    package = Path(train.__file__).parent
    for path in package.rglob("*.py"):
        text = path.read_text()
        assert 'objective == "' not in text and 'objective != "' not in text, path
