"""Pre-training and training from it: pre-train, train, sample; latents; parts of a batch; NaN."""

from __future__ import annotations

import functools
import json
import math
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import data_cases
from support.helpers import checkpoint_tensors, contents

from diffratio_fast import networks, ops, pretrain, sample, train
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.errors import UserError
from diffratio_fast.objectives.denoising import denoising_errors, denoising_loss, heun
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.training import denoiser_run, monitor
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.state.denoiser import PretrainState
from diffratio_fast.training.state.ema import power_decay, power_exponent
from diffratio_fast.training.step.stepper import learning_rate_factor

TINY = json.dumps({"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]})
TINY_EDM2 = json.dumps(
    {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [2],
     "channels_per_head": 16}
)  # fmt: skip
SHORT = ["--device", "cpu", "--batch-size", "8", "--log-every", "2", "--eval-every", "4",
         "--checkpoint-every", "2", "--snapshot-every", "4"]  # fmt: skip
BACKBONE: dict[str, Any] = {
    "device": "cpu", "batch_size": 12, "generator": "backbone", "ratio_network": "encoder",
    "backbone_options": TINY,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_images(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(monitor, "FEW_SAMPLES", 64)
    monkeypatch.setattr(denoiser_run, "GRID_COLUMNS", 1)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def color(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 prepared images, 3 x 8 x 8, three classes: like a small CIFAR-10."""
    return data_cases.prepared(tmp_path_factory.mktemp("color"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return data_cases.latent_shards(tmp_path_factory.mktemp("latents"))


def logged(run: Path, key: str) -> list[Any]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


def trainer(path: Path, **options: Any) -> Trainer:
    return Trainer("digits", TrainConfig(**(BACKBONE | options)), RunDirectory(path))


def pretrainer(path: Path, **options: Any) -> Pretrainer:
    config = {"device": "cpu", "batch_size": 12, "backbone_options": TINY, "beta1": 0.9} | options
    return Pretrainer("digits", PretrainConfig(**config), RunDirectory(path))


def advance(run: Trainer | Pretrainer, steps: int) -> dict[str, torch.Tensor]:
    batches = run.batches()
    for _ in range(steps):
        run.advance(next(batches))
    return {name: tensor.clone() for name, tensor in run.state.tensors()}


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["cifar10", "fashion"])
def test_pretrain_train_sample(color: Path, tmp_path: Path, preset: str) -> None:
    data = str(color) if preset != "fashion" else "digits"  # gray, with a different scaling
    common = [preset, *SHORT, "--data", data, "--backbone-options", TINY, "--precision", "float32"]
    first, second = str(tmp_path / "denoiser"), str(tmp_path / "run")
    assert pretrain.main([*common, "--steps", "6", "--run-dir", first]) == 0
    assert logged(tmp_path / "denoiser", "step")[-1] == 6
    assert len(list((tmp_path / "denoiser/samples").iterdir())) == 2
    assert train.main([*common, "--steps", "4", "--run-dir", second, "--init", first, "--ratio-warmup-steps",
                       "2", "--generator-ramp-steps", "1", "--refit-steps", "2"]) == 0  # fmt: skip
    out = tmp_path / "images.npz"
    assert sample.main([second, "--count", "9", "--out", str(out)]) == 0
    with np.load(out) as archive:
        assert archive["images"].dtype == np.uint8 and archive["images"].std() > 0
        assert archive["labels"].max() == (0 if preset == "cifar10" else 8)


def test_training_starts_from_the_average_and_waits_for_the_ratio_network(tmp_path: Path) -> None:
    options = ["digits", *SHORT, "--backbone-options", TINY, "--steps", "3", "--run-dir", str(tmp_path / "d")]
    assert pretrain.main(options) == 0
    denoiser, _ = networks.load_published(tmp_path / "d/denoiser.safetensors")
    run = trainer(tmp_path / "t", init=str(tmp_path / "d"), steps=9)
    assert run.config.warmup_and_ramp() == (500, 500)
    start = {name: tensor.clone() for name, tensor in run.state.generator.state_dict().items()}
    for name, tensor in denoiser.state_dict().items():
        assert torch.equal(start[f"denoiser.{name}"], tensor)
        if f"denoiser.{name}" in (encoder := run.state.ratio.state_dict()):
            assert torch.equal(encoder[f"denoiser.{name}"], tensor)
    assert not list(run.state.generator_optimizer.state)
    advance(run, 2)
    for name, tensor in run.state.generator.state_dict().items():
        assert torch.equal(start[name], tensor)  # frozen during the ratio network's warm-up
    assert run.state.ratio.head.read.weight.abs().max() > 0
    again = trainer(tmp_path / "t2", init=str(tmp_path / "d"), ratio_warmup_steps=1, generator_ramp_steps=3)
    rates = []
    for _ in range(5):
        advance(again, 1)
        rates.append(again.state.generator_optimizer.param_groups[0]["lr"] / again.config.generator_lr)
    assert rates == pytest.approx([0, 1 / 4, 2 / 4, 3 / 4, 1])


def test_latents_are_drawn_again_in_each_step_and_trained_on(latents: Path, tmp_path: Path) -> None:
    options = {"data": str(latents), "backbone": "edm2:xs", "backbone_options": TINY_EDM2}
    run = trainer(tmp_path, **options, steps=3)
    iteration, batch = run.iteration, next(run.batches())[0]
    assert batch[0].dtype == torch.float16 and batch[0].shape[1:] == (8, 4, 4)
    mean, std = batch[0].float().chunk(2, dim=1)

    def drawn(step: int) -> torch.Tensor:
        iteration.rng[1].fill_(step)
        x0, _, _ = iteration.part(batch, slice(0, 12))
        return run.dataset.scaling.to_records(x0)

    noise = ops.normal(ops.make_rng(0, 7), torch.arange(12), (4, 4, 4), ops.Purpose.POSTERIOR)
    torch.testing.assert_close(drawn(7), mean + std * noise, rtol=1e-4, atol=1e-4)
    assert not torch.equal(drawn(8), drawn(7))
    assert torch.equal(iteration.to_device(batch)[0], iteration.to_device(batch)[0])
    before = run.state.generator.denoiser.unet.out_gain.clone()
    advance(run, 2)
    assert run.state.generator.denoiser.unet.out_gain != before
    config = [*SHORT, "--data", str(latents), "--backbone", "edm2:xs", "--backbone-options", TINY_EDM2]
    assert pretrain.main(["imagenet512-xs", *config, "--precision", "float32", "--steps", "2", "--run-dir",
                          str(tmp_path / "p")]) == 0  # fmt: skip
    assert np.isfinite(logged(tmp_path / "p", "loss")).all()
    assert train.main(["imagenet512-xs", *config, "--precision", "float32", "--steps", "3", "--init",
                       str(tmp_path / "p"), "--ratio-warmup-steps", "1", "--refit-steps", "1",
                       "--run-dir", str(tmp_path / "t")]) == 0  # fmt: skip
    assert np.isfinite(logged(tmp_path / "t", "ratio_loss")).all()
    assert len(list((tmp_path / "t/samples").iterdir())) == 1


@pytest.mark.parametrize("kind", ["ratio", "mixer", "jeffreys", "denoiser", "edm2"])
def test_parts_of_a_batch_add_up_to_it(tmp_path: Path, kind: str) -> None:
    options: dict[str, Any] = {"precision": "float64", "optimizer": "adam", "flip_probability": 0.5}
    edm2 = {"backbone": "edm2:xs", "backbone_options": TINY_EDM2.replace("[2]", "[4]")}
    if kind in ("denoiser", "edm2"):
        make: Any = pretrainer
        options |= {"dropout": 0.3} | (edm2 if kind == "edm2" else {})
    else:
        make = trainer
        options |= {
            "ratio": {"ratio_dropout": 0.3, "ratio_roll_probability": 0.5, "ratio_steps": 2},
            "mixer": {"ratio_network": "mixer", "ratio_width": 16, "generator": "mlp"},
            "jeffreys": {"divergence": "jeffreys", "normalize_h": True, "noise_draws": 2},
        }[kind]
    whole = advance(make(tmp_path, **options), 3)
    for size in (12, 5):
        parts = advance(make(tmp_path, **options, micro_batch=size), 3)
        for name, tensor in whole.items():
            if size == 12:
                assert torch.equal(tensor, parts[name]), name
            elif not name.startswith("sums"):
                torch.testing.assert_close(parts[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    other = advance(make(tmp_path, **options, seed=1), 3)
    assert any(not torch.allclose(whole[name].double(), other[name].double(), atol=1e-3) for name in whole)


@pytest.mark.parametrize("make", [trainer, pretrainer])
def test_every_way_to_compute_trains_alike(tmp_path: Path, make: Any) -> None:
    plain = advance(make(tmp_path), 2)
    for option in ("channels_last", "activation_checkpointing"):
        other = advance(make(tmp_path, **{option: True}), 2)
        for name, tensor in plain.items():
            if name.startswith(("generator.", "ratio.", "denoiser.")):
                # Adam turns rounding of a gradient near zero into steps of its rate
                assert (tensor - other[name]).double().square().mean().sqrt() < 1e-3, (option, name)
    half = make(tmp_path, precision="bfloat16")
    state = advance(half, 2)
    assert all(bool(tensor.isfinite().all()) for tensor in state.values())
    assert any(not torch.equal(state[name], tensor) for name, tensor in plain.items())


@pytest.mark.slow
def test_compiled_networks_train_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"backbone": "edm2:xs", "backbone_options": TINY_EDM2, "precision": "float64"}
    options["dropout"] = 0.2
    plain = advance(pretrainer(tmp_path, **options), 3)
    # captured and differentiated as by the default backend, without its slow code generation
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    compiled = advance(pretrainer(tmp_path, **options, compile=True), 3)
    for name, tensor in plain.items():
        torch.testing.assert_close(compiled[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


def poisoned(run: Trainer | Pretrainer, part: str) -> None:
    with torch.no_grad():
        next(getattr(run.state, part).parameters()).flatten()[0] = math.nan


def test_nan_is_reported_by_step_and_name_and_stops_the_run(tmp_path: Path) -> None:
    arguments = ["digits", *SHORT, "--backbone-options", TINY, "--steps", "9", "--run-dir", str(tmp_path)]
    with pytest.raises(UserError) as error:
        pretrain.main([*arguments, "--lr", "1e30"])
    printed = str(error.value)
    assert (
        "step 2: " in printed
        and "NaN or infinite" in printed
        and "--on-nonfinite" in printed
        and "\n" not in printed
    )
    assert not (tmp_path / "denoiser.safetensors").exists()
    assert not (tmp_path / "checkpoint").exists()
    run = trainer(tmp_path / "t")
    advance(run, 1)
    assert [check.message() for check in run.iteration.checks.values()] == [None, None]
    poisoned(run, "ratio")
    advance(run, 2)
    assert "step 2: the ratio loss" in str(run.iteration.checks["ratio"].message())
    assert "step 2: the log ratio of fakes" in str(run.iteration.checks["generator"].message())


@pytest.mark.parametrize("chosen", ["generator", "ratio"])
def test_one_of_the_networks_starts_from_a_denoiser(tmp_path: Path, chosen: str) -> None:
    source = pretrainer(tmp_path / "d", steps=1)
    source._save(tmp_path / "d" / "denoiser.safetensors", source.state.average)
    random = trainer(tmp_path / "r")
    run = trainer(tmp_path / "t", init=str(tmp_path / "d"), init_networks=chosen)
    other = "ratio" if chosen == "generator" else "generator"
    same = [
        torch.equal(a, b)
        for a, b in zip(
            getattr(run.state, other).parameters(), getattr(random.state, other).parameters(), strict=True
        )
    ]
    assert all(same)
    given = source.state.average.state_dict()
    taken = getattr(run.state, chosen).denoiser.state_dict()
    assert taken and all(torch.equal(tensor, given[name]) for name, tensor in taken.items())


def test_an_update_that_is_not_finite_can_be_skipped(tmp_path: Path) -> None:
    run = pretrainer(tmp_path, on_nonfinite="skip")
    printed: list[str] = []
    run.iteration.checks["denoiser"].warn = printed.append
    before = advance(run, 1)
    good = run.iteration.denoiser
    run.iteration.denoiser = lambda *a: good(*a) * math.inf
    after = advance(run, 2)
    assert (
        len(printed) == 2
        and printed[0].startswith("step 2: the loss (and ")
        and printed[0].endswith("skipped")
    )
    assert run.iteration.checks["denoiser"].skipped == 2 and run.state.step == 3
    for name, tensor in before.items():
        assert name in PretrainState.TENSORS or torch.equal(tensor, after[name])
    run.iteration.denoiser = good
    moved = advance(run, 1)
    assert all(bool(t.isfinite().all()) for name, t in moved.items() if name != "sums")
    assert any(not torch.equal(after[name], moved[name]) for name in before if name.startswith("denoiser"))


def test_apex_where_it_is_and_where_it_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "apex", None)
    with pytest.raises(UserError, match="apex with its CUDA extensions is not installed"):
        trainer(tmp_path, optimizer="apex")

    class FusedAdam(torch.optim.AdamW):
        """Same interface as apex's: the step count is in the group."""

        def __init__(self, parameters: Any, *, adam_w_mode: bool, **settings: Any) -> None:
            assert adam_w_mode
            super().__init__(parameters, **settings)

        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                group["step"] = group.get("step", 0) + 1
            super().step()

    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    module = types.ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "apex.optimizers", module)
    run = trainer(tmp_path, optimizer="apex")
    advance(run, 3)
    run.checkpoints.save(run.state)
    assert run.checkpoints.failure() is None
    again = trainer(tmp_path, optimizer="apex")
    again.checkpoints.load(again.state)
    assert again.state.ratio_optimizer.param_groups[0]["step"] == 3
    one, other = advance(run, 1), advance(again, 1)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
def test_interrupted_and_continued_pretraining_is_bit_identical(tmp_path: Path) -> None:
    def go(where: str, steps: int) -> None:
        options = [*SHORT, "--backbone-options", TINY, "--lr-schedule", "constant", "--dropout", "0.2",
                   "--posthoc-ema", "0.05,0.1"]  # fmt: skip
        assert (
            pretrain.main(["digits", *options, "--steps", str(steps), "--run-dir", str(tmp_path / where)])
            == 0
        )

    go("a", 5)
    go("b", 3)
    go("b", 5)
    a, b = (checkpoint_tensors(tmp_path / run) for run in "ab")
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    before = contents(tmp_path / "a")
    go("a", 5)
    assert contents(tmp_path / "a") == before


# The objective, against closed forms.


def test_the_best_denoiser_of_normal_data_and_its_loss() -> None:
    """For x0 normal of std s, D(x) = s^2 x / (s^2 + sigma^2) leaves s^2 sigma^2 / (s^2 + sigma^2)."""
    count, s = 4000, 0.5
    x0 = s * torch.randn(count, 1, 4, 4, dtype=torch.float64)
    sigma = torch.full((count,), 0.7, dtype=torch.float64)

    def best(x: torch.Tensor, level: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return x * (s**2 / (s**2 + level**2)).reshape(-1, 1, 1, 1)

    index = torch.arange(count)
    errors = denoising_errors(best, x0, sigma, index, ops.make_rng(0, 0), index, ops.Purpose.DENOISING_NOISE)
    # the weight is the inverse of that error for s = sigma_data
    assert float(errors.mean()) == pytest.approx(1, abs=4 * math.sqrt(2 / (16 * count)))
    images = heun(best, torch.randn(2000, 1, 4, 4, dtype=torch.float64), torch.zeros(2000), steps=80)
    assert float(images.std()) == pytest.approx(s, rel=0.02)  # the sampler maps the prior to the data


def test_the_learned_uncertainty_is_best_at_the_log_error() -> None:
    errors = torch.tensor([0.3, 2.0, 7.0], dtype=torch.float64)
    u = errors.log().requires_grad_()
    loss = denoising_loss(errors, u)
    loss.backward()
    assert torch.allclose(u.grad, torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert float(loss.detach()) == pytest.approx(float((1 + errors.log()).mean()))
    assert float(denoising_loss(errors, None)) == pytest.approx(3.1)


def test_the_power_function_average_has_its_width() -> None:
    for std in (0.05, 0.1, 0.2):
        gamma = power_exponent(std)
        count = 4000
        weights = np.zeros(count)
        for update in range(count):
            decay = power_decay(update, std)
            weights *= decay
            weights[update] += 1 - decay
        t = (np.arange(count) + 0.5) / count
        mean = float(weights @ t)
        assert weights.sum() == pytest.approx(1)
        assert math.sqrt(weights @ (t - mean) ** 2) == pytest.approx(std, rel=0.01)
        assert mean == pytest.approx((gamma + 1) / (gamma + 2), rel=1e-3)


def test_learning_rates_fall_by_the_inverse_square_root() -> None:
    config = PretrainConfig(lr_schedule="inverse_sqrt", lr_decay_steps=100, lr_warmup_steps=9, steps=1000)
    factors = [learning_rate_factor(config, step) for step in (0, 4, 9, 100, 400, 900)]
    assert factors == pytest.approx([0.1, 0.5, 1, 1, 1 / 2, 1 / 3])


def test_an_unconditional_run_sees_one_class(color: Path, tmp_path: Path) -> None:
    run = trainer(tmp_path, data=str(color), class_conditional=False)
    assert run.dataset.class_names == ("all",) and run.state.generator.denoiser.label_dim == 0
    labels = {int(label) for _, part in next(run.batches()) for label in part}
    assert labels == {0}
    assert set(open_dataset(str(color)).first("train", 30)[1].tolist()) == {0, 1, 2}
