"""Monitoring of a run: the bound per noise level, its refit, warnings, TensorBoard events."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.helpers import SMALL
from torch import Tensor

from diffratio_fast import ops, train
from diffratio_fast.config.noise_laws import parse_noise_law
from diffratio_fast.config.presets import PRESETS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.metrics.frechet import frechet_distance, moments
from diffratio_fast.objectives.held_out import LOG_2, log_ratios, noise_levels, pair_bounds
from diffratio_fast.objectives.refit import LEVELS
from diffratio_fast.report.diagnosis import warnings
from diffratio_fast.runs.log import MetricsLog
from diffratio_fast.training.monitor import Evaluation, evaluation_images
from diffratio_fast.training.state.generator import initial_state
from diffratio_fast.training.step.generator import Iteration

CPU = torch.device("cpu")


def evaluation(**options: Any) -> Evaluation:
    config = TrainConfig(**(PRESETS["digits"] | {"ratio_width": 16, "generator_width": 16} | options))
    dataset = open_dataset("digits")
    state = initial_state(config, dataset, CPU)
    return Evaluation(config, dataset, Iteration(config, dataset.scaling, state, CPU))


def test_pair_bounds_average_to_the_bound() -> None:
    real, fake = torch.randn(2, 100, dtype=torch.float64).unbind()
    logits = torch.cat([real, fake])
    labels = torch.cat([torch.ones_like(real), torch.zeros_like(fake)])
    loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
    assert float(pair_bounds(real, fake).mean()) == pytest.approx(LOG_2 - float(loss))


def test_noise_levels_are_quantiles() -> None:
    levels = noise_levels(parse_noise_law("loguniform(0.01, 1)"), 2)
    torch.testing.assert_close(levels.log10(), torch.tensor([-1.5, -0.5], dtype=torch.float64))


def test_log_ratios_noise_every_half_and_draw_apart() -> None:
    first = lambda x, sigma, labels: x.flatten(1)[:, 0]  # noqa: E731
    zeros = torch.zeros(600, 1, 1, 2)
    rng, index = ops.make_rng(0, 0), torch.arange(600)
    sigma = torch.tensor([[0.5, 2.0]]).expand(600, 2)
    labels = torch.zeros(600).long()
    real, fake = log_ratios(first, zeros, zeros, sigma, labels, rng, index, shared_noise=False)
    columns = torch.cat((real, fake), 1)
    np.testing.assert_allclose(columns.std(0), [0.5, 2.0, 0.5, 2.0], rtol=0.15)
    assert (torch.corrcoef(columns.T) - torch.eye(4)).abs().max() < 0.2
    some = log_ratios(
        first, zeros[550:], zeros[550:], sigma[550:], labels[550:], rng, index[550:], shared_noise=False
    )
    assert torch.equal(some[0], real[550:])  # for any chunks
    halves = log_ratios(first, zeros, zeros, sigma, labels, rng, index, shared_noise=True)
    assert torch.equal(halves[0], real) and torch.equal(halves[1], real)


def test_shared_noise_lowers_the_variance_of_the_bound() -> None:
    count = 4000
    real, fake = torch.randn(2, count, 1, 1, 1, dtype=torch.float64) / 2
    rng, index, labels = ops.make_rng(0, 0), torch.arange(count), torch.zeros(count).long()
    sigma = torch.tensor([[0.1, 1.0, 4.0]], dtype=torch.float64).expand(count, 3)

    def ratio(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:  # of N(0.2, 1/4) to N(0, 1/4)
        return (0.2 * x.flatten(1)[:, 0] - 0.02) / (0.25 + sigma**2)

    bounds = [
        pair_bounds(*log_ratios(ratio, real + 0.2, fake, sigma, labels, rng, index, shared_noise=shared))
        for shared in (True, False)
    ]
    together, apart = (bound.double() for bound in bounds)
    error = ((together.var(0) + apart.var(0)) / count).sqrt()
    assert bool(((together.mean(0) - apart.mean(0)).abs() < 4 * error).all())
    assert bool((together.var(0) < apart.var(0))[1:].all())


def known(noised: Tensor, sigma: Tensor | float, labels: Tensor) -> Tensor:
    """A log ratio that is the mean pixel over the noise level."""
    return noised.flatten(1).mean(1) / sigma


def test_the_bound_of_a_known_network() -> None:
    tool = evaluation()
    tool.iteration.ratio = known
    whole = tool.bound("validation", every_level=True)
    assert whole.value == pytest.approx(np.mean(whole.by_level))
    # by hand, from the same reals, fakes, levels and noise
    real, labels = tool._held_out["validation"]
    rng, index = ops.make_rng(0, 0), torch.arange(len(labels))
    latents = ops.normal(rng, index, tool.iteration.state.generator.latent_shape, ops.Purpose.SAMPLE_LATENT)
    fake = tool.iteration.state.generator(latents, labels)
    levels = noise_levels(tool.iteration.ratio_law, LEVELS)
    for k, level in enumerate(levels.tolist()):
        halves = [
            known(x + level * ops.normal(rng, index, x.shape[1:], purpose, draw=k), level, labels)
            for x, purpose in zip((real, fake), [ops.Purpose.EVALUATION_REAL] * 2, strict=True)
        ]
        assert whole.by_level[k] == pytest.approx(float(pair_bounds(*halves).mean().detach()), abs=1e-5)
        right = ((halves[0] > 0).float().mean() + (halves[1] < 0).float().mean()) / 2
        assert whole.accuracy[k] == pytest.approx(float(right), abs=1e-5)
    quick = tool.bound("validation")
    assert all(map(math.isfinite, quick.by_level)) and abs(quick.value - whole.value) < 6 * whole.error


def test_generator_gradient_of_a_known_network() -> None:
    """l = mean / sigma has |grad l| = 1 / (8 sigma); reverse KL with w = sigma^2 leaves sigma / 8."""
    tool = evaluation(divergence="reverse_kl", weight="sigma2")
    tool.iteration.ratio = known
    found = tool._generator_gradient()
    sigma = np.array(found["generator_sigma"])
    np.testing.assert_allclose(found["log_ratio_gradient_by_sigma"], 1 / (8 * sigma), rtol=1e-4)
    np.testing.assert_allclose(found["generator_gradient_share"], sigma / sigma.sum(), rtol=1e-4)


def test_refitting_finds_what_the_online_network_misses_and_changes_nothing() -> None:
    tool = evaluation(ratio_width=64, ratio_lr=4e-3)
    state = tool.iteration.state
    before = {name: tensor.clone() for name, tensor in state.tensors()}
    fields, fitted = tool.loss_by_sigma()
    assert fitted is not None and fields["divergence"] == pytest.approx(0, abs=1e-6)
    assert fields["divergence_refit"] > 0.1  # an untrained generator is easy to distinguish from digits
    assert np.mean(fields["divergence_refit_by_sigma"]) == pytest.approx(fields["divergence_refit"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors())
    again, _ = tool.loss_by_sigma()
    assert again == fields
    assert tool.refitted(0) is None
    rows = tool.calibrations(fitted)
    assert set(rows) == {"online", "average", "refitted"} and len(rows["online"]) == LEVELS
    assert rows["online"][0]["auc"] == pytest.approx(0.5)
    assert rows["refitted"][0]["auc"] > 0.9


def test_short_runs_on_a_cpu_are_measured_on_fewer_images() -> None:
    cuda = torch.device("cuda")
    for steps, expected in ((50, 1000), (500, 8000), (4000, 10_000)):
        config = TrainConfig(steps=steps, batch_size=128)
        assert evaluation_images(config, CPU) == expected and evaluation_images(config, cuda) == 10_000
    chosen = TrainConfig(steps=10, eval_images=50)
    assert evaluation_images(chosen, CPU) == evaluation_images(chosen, cuda) == 50
    tool = evaluation(eval_images=50, refit_steps=1)
    assert {split: len(labels) for split, (_, labels) in tool._held_out.items()} == {
        "train": 50, "validation": 50
    }  # fmt: skip
    drawn: list[int] = []
    tool.iteration.state.average.register_forward_hook(lambda _, inputs, __: drawn.append(len(inputs[0])))
    figures = tool.summary()
    assert figures["evaluation_images"] == 50 and sum(drawn) == 256  # whole blocks are made
    pixels = tool.quality
    assert pixels is not None
    floor = frechet_distance(moments(pixels.train[0][:50]), moments(pixels.split("test")[0]))
    assert figures["frechet_distance_floor"] == pytest.approx(floor)
    whole = evaluation().summary()
    assert whole["evaluation_images"] == 10_000 and whole["frechet_distance_floor"] < floor / 2
    drawn.clear()
    tool.calibrations(None)
    assert sum(drawn) == 2 * 256  # once for the online network, once for its average


def line(step: int, **values: Any) -> dict[str, Any]:
    base = {
        "step": step, "divergence": 0.1, "divergence_train": 0.1, "divergence_error": 0.005,
        "divergence_train_error": 0.005, "sigma": [0.1, 1.0], "divergence_by_sigma": [0.1, 0.1],
        "ratio_accuracy_by_sigma": [0.6, 0.55],
    }  # fmt: skip
    return base | values


@pytest.mark.parametrize(
    ("history", "kinds"),
    [
        ([], []),
        ([line(1), line(2)], []),
        ([line(1, divergence_train=0.12), line(2, divergence_train=0.2)], ["overfitting"]),
        ([line(1, divergence_train=0.3), line(2, divergence_train=0.2)], []),  # the gap shrinks
        ([line(1), line(2, divergence_train=0.2, divergence_error=0.05)], []),  # within the error
        ([line(1, divergence_refit=0.1), line(2, divergence_refit=0.2)], ["rising"]),
        ([line(1, divergence_refit=0.2), line(2, divergence_refit=0.1)], []),
        ([line(1, divergence=0.05, divergence_train=0.05), line(2)], ["rising"]),  # without a refit
        (
            [
                line(1, divergence_refit=0.1, frechet_distance_validation=2.0),
                line(2, divergence_refit=0.2, frechet_distance_validation=1.0),
            ],
            [],  # the images are still closer: the ratio network has improved
        ),
        ([line(1, divergence_refit=None), line(2, divergence_refit=0.2)], []),
        ([line(1, ratio_accuracy_by_sigma=[1.0, 0.7])], ["saturated"]),
        ([line(1, ratio_accuracy_by_sigma=[None, 0.7])], []),
    ],
)
def test_warnings(history: list[dict[str, Any]], kinds: list[str]) -> None:
    found = warnings([{"step": 0, "ratio_loss": 1.0}, *history])
    assert [kind for kind, _ in found] == kinds
    assert all(len(text) > 60 and "nan" not in text for _, text in found)


def test_what_happens_in_the_warm_up_is_no_rise() -> None:
    history = [line(1, divergence_refit=0.05), line(5, divergence_refit=0.2)]
    assert warnings(history, after=2) == []


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "m.jsonl", 0)
    log.write({"step": 1, "a": [1.0, math.nan], "b": math.inf})
    log.close()
    assert json.loads((tmp_path / "m.jsonl").read_text()) == {"step": 1, "a": [1.0, None], "b": None}
    assert MetricsLog(tmp_path / "m.jsonl", 1).lines == [{"step": 1, "a": [1.0, None], "b": None}]
    assert MetricsLog(tmp_path / "m.jsonl", 0).lines == []


def test_a_run_without_tensorboard_prints_a_note_and_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    threads = torch.get_num_threads()
    assert train.main([*SMALL, "--steps", "4", "--eval-every", "2", "--run-dir", str(tmp_path / "run")]) == 0
    torch.set_num_threads(threads)
    assert "no log for tensorboard: it is not installed" in capsys.readouterr().out
    lines = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    evaluated = [entry for entry in lines if "sigma" in entry]
    assert [entry["step"] for entry in evaluated] == [2, 4]
    for name in (
        "divergence_by_sigma", "divergence_train_by_sigma", "ratio_accuracy_by_sigma",
        "divergence_refit_by_sigma", "log_ratio_gradient_by_sigma", "generator_gradient_share",
    ):  # fmt: skip
        assert len(evaluated[0][name]) == LEVELS and None not in evaluated[0][name]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["divergence_refit"] == evaluated[-1]["divergence_refit"]
