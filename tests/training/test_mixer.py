"""Training with a RatioMixer: the fused operations inside a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import SMALL, one_error_line, run

from diffratio_fast.config.train import TrainConfig
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.objectives import diffratio, fused
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.train import parser, resolve
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.step import generator

SMALL_CONFIG: dict[str, Any] = {
    "device": "cpu", "batch_size": 16, "generator_width": 16, "ratio_width": 16, "ratio_depth": 2,
    "latent_size": 8, "ratio_network": "mixer",
}  # fmt: skip


def trainer(path: Path, **options: Any) -> Trainer:
    return Trainer("digits", TrainConfig(**(SMALL_CONFIG | options)), RunDirectory(path))


def after_steps(path: Path, count: int, **options: Any) -> list[torch.Tensor]:
    one = trainer(path, **options)
    batches = one.batches()
    for _ in range(count):
        one.iteration.run(next(batches))
    return [p.detach() for n in (one.state.ratio, one.state.generator) for p in n.parameters()]


@pytest.mark.slow
def test_the_command_trains_and_continues(tmp_path: Path) -> None:
    arguments = [*SMALL, "--ratio-network", "mixer", "--run-dir", "run", "--steps"]
    first = run("train", *arguments, 6, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    second = run("train", *arguments, 9, cwd=tmp_path)
    assert second.returncode == 0 and "resuming at step 6" in second.stdout, second.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "ratio_loss" in line][-1] == 9


@pytest.mark.slow
def test_a_patch_that_does_not_divide_is_one_line(tmp_path: Path) -> None:
    result = run("train", *SMALL, "--ratio-network", "mixer", "--ratio-patch", 3, "--steps", 2, cwd=tmp_path)
    assert "patches of 3 x 3 do not divide images of 8 x 8" in one_error_line(result)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({}, 1e-3),
        ({"precision": "float64"}, 1e-9),
        ({"noise_draws": 3, "divergence": "jeffreys", "normalize_h": True}, 1e-3),
    ],
)
def test_fused_and_composed_train_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tolerance: float
) -> None:
    assert trainer(tmp_path, **options).iteration.mixer is not None
    through_operations = after_steps(tmp_path, 2, **options)
    for name in ("ratio_loss", "score_difference"):
        composed = getattr(diffratio, name)
        monkeypatch.setattr(fused, name, lambda *a, composed=composed, dtype, **k: composed(*a, **k))
    assert generator.fused is fused
    through_autograd = after_steps(tmp_path, 2, **options)
    for a, b in zip(through_operations, through_autograd, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"ratio_roll_probability": 0.5}])
def test_other_precisions_and_rolls_train_too(tmp_path: Path, options: dict[str, Any]) -> None:
    before = after_steps(tmp_path, 0, **options)
    after = after_steps(tmp_path, 3, **options)
    assert all(bool(value.isfinite().all()) for value in after)
    assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    fits = trainer(tmp_path, **options).iteration.mixer
    assert (fits is None) == ("ratio_roll_probability" in options)


def test_a_preset_has_defaults_for_the_mixer() -> None:
    def configuration(*words: str) -> TrainConfig:
        arguments = vars(parser().parse_args([*words]))
        for name in ("dry_run", "fresh", "resume_from", "accept_data"):
            del arguments[name]
        return resolve(arguments)[1]

    assert configuration("--ratio-network", "mixer").ratio_width == 64
    assert configuration("--ratio-network", "mixer", "--ratio-width", "128").ratio_width == 128
    assert configuration().ratio_width == 192


def test_a_mixer_of_a_run_is_built_from_its_options(tmp_path: Path) -> None:
    network = trainer(tmp_path, ratio_expansion=3, ratio_patch=4).state.ratio
    assert isinstance(network, RatioMixer)
    patch, position, _, _, up, *_ = network.weights()
    assert tuple(patch.shape) == (16, 16) and len(position) == 4 and up.shape[1] == 48
