"""Score distillation: its gradient against closed forms, its runs, and its errors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.helpers import SMALL, checkpoint_tensors, one_error_line, run
from torch import Tensor

from diffratio_fast import networks, ops, pretrain, train
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.errors import UserError
from diffratio_fast.networks.mlp import MLPDenoiser
from diffratio_fast.objectives import diffratio, vsd
from diffratio_fast.training import monitor

SHAPE = (2, 2, 2)
DATA_VARIANCE, MODEL_VARIANCE, MODEL_MEAN = 0.25, 0.09, 0.3
DENSE = ["--backbone", "mlp", "--backbone-options", '{"width": 16, "depth": 2}']
DISTIL = [*SMALL, *DENSE, "--objective", "vsd", "--steps", "8", "--lr-schedule", "constant"]


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SAMPLES", 64)


class Gaussian:
    """The denoiser E[x0 | x_sigma] and the log density of N(mean, variance I) under noise, in closed form."""

    def __init__(self, mean: float, variance: float) -> None:
        self.mean, self.variance = mean, variance

    def __call__(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        share = self.variance / (self.variance + sigma.reshape(-1, 1, 1, 1) ** 2)
        return self.mean + share * (x - self.mean)

    def log_density(self, x: Tensor, sigma: Tensor) -> Tensor:
        variance = self.variance + sigma**2
        squares = (x - self.mean).flatten(1).square().sum(1)
        return -squares / (2 * variance) - x[0].numel() / 2 * variance.log()


DATA, MODEL = Gaussian(0.0, DATA_VARIANCE), Gaussian(MODEL_MEAN, MODEL_VARIANCE)


def batch(count: int = 5, draws: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "fake": torch.randn(count, *SHAPE, generator=generator, dtype=torch.float64),
        "sigma": 0.1 + 2 * torch.rand(count, draws, generator=generator, dtype=torch.float64),
        "labels": torch.zeros(count, dtype=torch.int64),
        "rng": ops.make_rng(3, 7),
        "index": torch.arange(count) + 11,
    }


def noised(given: dict[str, Tensor], draw: int) -> Tensor:
    return ops.add_noise(
        given["fake"], given["sigma"][:, draw], given["rng"], given["index"], ops.Purpose.NOISE_GENERATOR,
        draw=draw,
    )  # fmt: skip


def test_gradient_is_the_exact_score_difference() -> None:
    given = batch()
    weight = given["sigma"] ** 1.5
    outcome = vsd.score_difference(MODEL, DATA, **given, weight=weight)
    exact = torch.zeros_like(given["fake"])
    for k in range(3):
        sigma = given["sigma"][:, k].reshape(-1, 1, 1, 1)
        x = noised(given, k)
        model = -(x - MODEL_MEAN) / (MODEL_VARIANCE + sigma**2)
        data = -x / (DATA_VARIANCE + sigma**2)
        exact += weight[:, k].reshape(-1, 1, 1, 1) * (model - data) / 3
    torch.testing.assert_close(outcome.gradient, exact, rtol=1e-12, atol=1e-12)


def test_equals_the_gradient_of_the_exact_ratio() -> None:
    """With optimal networks both objectives have the same gradient for each draw."""
    given = batch()
    weight = torch.ones_like(given["sigma"])

    def ratio(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return DATA.log_density(x, sigma) - MODEL.log_density(x, sigma)

    by_ratio = diffratio.score_difference(ratio, **given, weight=weight, divergence=DIVERGENCES["reverse_kl"])
    by_denoisers = vsd.score_difference(MODEL, DATA, **given, weight=weight)
    torch.testing.assert_close(by_denoisers.gradient, by_ratio.gradient, rtol=1e-10, atol=1e-12)


def test_normalization_divides_by_the_distance_to_the_teacher() -> None:
    given = batch(draws=1)
    plain = vsd.score_difference(MODEL, DATA, **given, weight=given["sigma"] ** 2)
    normalized = vsd.score_difference(MODEL, DATA, **given, weight=given["sigma"] ** 2, normalize=True)
    x, sigma = noised(given, 0), given["sigma"].reshape(-1, 1, 1, 1)
    target = x * DATA_VARIANCE / (DATA_VARIANCE + sigma**2)
    scale = (given["fake"] - target).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(normalized.gradient, plain.gradient / scale, rtol=1e-12, atol=0)
    difference = (MODEL(x, given["sigma"], given["labels"]) - target).abs().mean((1, 2, 3))
    torch.testing.assert_close(plain.distance[:, 0], difference)


def test_student_learns_the_denoiser_of_what_the_generator_makes() -> None:
    """The loss's minimum over linear denoisers is at the posterior mean, and the fakes get no gradient."""
    count = 40_000
    generator = torch.Generator().manual_seed(1)
    fake = MODEL_MEAN + MODEL_VARIANCE**0.5 * torch.randn(
        count, 1, 1, 1, generator=generator, dtype=torch.float64
    )
    fake.requires_grad_()
    slope = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    level, index = 0.4, torch.arange(count)
    sigma = torch.full((count,), level, dtype=torch.float64)
    best = MODEL_VARIANCE / (MODEL_VARIANCE + level**2)

    def student(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        return MODEL_MEAN + slope * (x - MODEL_MEAN)

    errors = vsd.student_errors(student, fake, sigma, torch.zeros_like(index), ops.make_rng(0, 0), index)
    (first,) = torch.autograd.grad(errors.mean(), slope, create_graph=True)
    (second,) = torch.autograd.grad(first, slope)
    assert (
        abs(float((slope - first / second).detach()) - best) < 0.01
    )  # a parabola: Newton's step ends at its minimum
    assert fake.grad is None


def dense() -> MLPDenoiser:
    config = {"img_resolution": 4, "img_channels": 2, "label_dim": 3, "width": 16, "depth": 2}
    network = networks.from_published("mlp", config)
    assert isinstance(network, MLPDenoiser)
    networks.initialize(network, 0, stream=0)
    return network


def test_dense_denoiser_starts_as_the_optimal_linear_one() -> None:
    """F starts at zero, and c_skip x is the posterior mean for data N(0, sigma_data^2)."""
    network = dense().double()
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    sigma = torch.tensor([0.1, 0.5, 3.0], dtype=torch.float64)
    expected = x * (0.25 / (0.25 + sigma**2)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(network(x, sigma, torch.arange(3)), expected)


def test_dense_denoiser_uses_class_and_noise_level() -> None:
    network = dense()
    network.requires_grad_(False).model.last.weight.normal_()
    x = torch.randn(1, 2, 4, 4).expand(2, -1, -1, -1)
    labels, same = torch.tensor([0, 1]), torch.tensor([0.5, 0.5])
    out = network(x, same, labels)
    assert float((out[0] - out[1]).abs().max()) > 1e-3
    c_skip, c_out = 0.25 / 1.25, 0.5 / 1.25**0.5
    other = network(x, torch.tensor([1.0, 1.0]), labels)
    inner = (other - c_skip * x) / c_out
    assert float((inner[0] - ((out - 0.5 * x) / (0.5 * 0.5**0.5))[0]).abs().max()) > 1e-3


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``pretrain`` with a dense denoiser."""
    folder = tmp_path_factory.mktemp("teacher") / "den"
    options = ["--device", "cpu", "--threads", "1", "--batch-size", "16", "--steps", "6", "--log-every", "3",
               "--eval-every", "6", "--checkpoint-every", "6"]  # fmt: skip
    assert pretrain.main(["digits", *options, *DENSE, "--run-dir", str(folder)]) == 0
    return folder


def test_run_resumes_exactly_and_without_its_teacher(teacher: Path, tmp_path: Path) -> None:
    options = [*DISTIL, "--teacher", str(teacher)]
    assert train.main(["digits", *options, "--run-dir", str(tmp_path / "whole")]) == 0
    parts = tmp_path / "parts"
    assert train.main(["digits", *options, "--steps", "3", "--run-dir", str(parts)]) == 0
    hidden = teacher.rename(teacher.with_name("elsewhere"))
    try:
        assert train.main(["digits", *options, "--run-dir", str(parts)]) == 0
    finally:
        hidden.rename(teacher)
    wanted, found = (networks_of(folder) for folder in (tmp_path / "whole", parts))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    lines = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    assert any("student_loss" in line for line in lines)
    measured = next(line for line in lines if "student_error_by_sigma" in line)
    assert abs(sum(measured["generator_gradient_share"]) - 1) < 1e-9
    assert (parts / "generator.safetensors").exists() and not (parts / "ratio.safetensors").exists()
    assert "frechet_distance" in json.loads((parts / "summary.json").read_text())


def networks_of(folder: Path) -> dict[str, Tensor]:
    return checkpoint_tensors(folder)


def test_student_and_teacher_start_alike_and_only_the_student_learns(teacher: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert train.main(["digits", *DISTIL, "--teacher", str(teacher), "--run-dir", str(folder)]) == 0
    given, kept = load_file(teacher / "denoiser.safetensors"), networks_of(folder)
    assert all(torch.equal(kept[f"teacher.{name}"], tensor) for name, tensor in given.items())
    moved = [float((kept[f"ratio.{name}"] - tensor).abs().max()) for name, tensor in given.items()]
    assert max(moved) > 0 and max(moved) < 0.1  # eight steps of Adam from the teacher's weights


def test_generator_and_teacher_from_init(teacher: Path, tmp_path: Path) -> None:
    """A generator of the same backbone gets the denoiser's weights; --init alone also sets the teacher."""
    options = [*DISTIL, "--generator", "backbone", "--init", str(teacher), "--ratio-warmup-steps", "8",
               "--generator-ramp-steps", "0"]  # fmt: skip
    folder = tmp_path / "run"
    assert train.main(["digits", *options, "--run-dir", str(folder)]) == 0
    kept = networks_of(folder)
    same = [
        torch.equal(tensor, kept[name.replace("teacher.", "generator.denoiser.")])
        for name, tensor in kept.items()
        if name.startswith("teacher.")
    ]
    assert same and all(same)  # the complete run is warm-up, in which the generator is frozen


@pytest.mark.parametrize(
    ("options", "printed"),
    [
        ({"objective": "vsd"}, "--teacher RUN"),
        ({"objective": "vsd", "teacher": "x", "divergence": "jeffreys"}, "reverse_kl"),
        ({"objective": "vsd", "teacher": "x", "ratio_ema_half_life_images": 5.0}, "none"),
        ({"teacher": "x"}, "--objective vsd"),
        ({"vsd_normalize": True}, "--objective vsd"),
    ],
)
def test_refused(options: dict[str, Any], printed: str) -> None:
    with pytest.raises(UserError, match=printed):
        TrainConfig(**options)


def test_teacher_of_another_network_is_refused(teacher: Path, tmp_path: Path) -> None:
    options = [*DISTIL, "--backbone-options", '{"width": 8, "depth": 2}', "--teacher", str(teacher)]
    with pytest.raises(UserError, match=r"--teacher .*its width is 16; this run needs 8"):
        train.main(["digits", *options, "--run-dir", str(tmp_path / "run")])
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_command_line_reports_what_is_missing(tmp_path: Path) -> None:
    result = run("train", "digits", "--objective", "vsd", "--run-dir", tmp_path / "run", cwd=tmp_path)
    assert "--teacher RUN" in one_error_line(result)
    options = [*DISTIL, "--teacher", str(tmp_path), "--run-dir", str(tmp_path / "run")]
    with pytest.raises(UserError, match="not a finished run of pretrain"):
        train.main(["digits", *options])


def test_another_backbone_has_its_own_options() -> None:
    """The preset's options belong to its U-Net; with only --backbone, another network uses its defaults."""
    _, config = pretrain.resolve({"preset": "digits", "config": None, "backbone": "mlp"})
    assert config.backbone_options == "{}"
    _, config = pretrain.resolve({"preset": "digits", "config": None, "lr": 1.0})
    assert "model_channels" in config.backbone_options


def test_dry_run_counts_the_teacher(
    teacher: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*DISTIL, "--teacher", str(teacher), "--run-dir", str(tmp_path / "run")]
    assert train.main(["digits", *options, "--dry-run"]) == 0
    plan = capsys.readouterr().out
    assert "student" in plan and "score distillation" in plan
    assert not (tmp_path / "run").exists()
