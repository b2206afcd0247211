"""Plans: the estimate against the allocator, every preset, plans that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from diffratio_fast import pretrain, train
from diffratio_fast.config.presets import DATA_SHAPES, DESCRIPTIONS, PRESETS, PRETRAIN_PRESETS, RATIO_NETWORKS
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import model_shape
from diffratio_fast.errors import UserError
from diffratio_fast.networks.backbone import build_denoiser
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.memory import cost
from diffratio_fast.training.plan import planned_data

SONG = json.dumps({"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 2, "attn_resolutions": [4]})
EDM2 = json.dumps({"model_channels": 64, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]})
MIXER = {"ratio_network": "mixer", "ratio_depth": 4}
BACKBONE = {"generator": "backbone", "ratio_network": "encoder", "backbone_options": SONG}


def measured_peak(config: RunConfig, path: Path) -> int:
    """Peak memory of a step in bytes, from the CPU allocator's record."""
    run: Any = (Trainer if isinstance(config, TrainConfig) else Pretrainer)(
        "digits", config, RunDirectory(path)
    )
    batches = run.batches()
    run.advance(next(batches))
    batch = next(batches)
    networks = [getattr(run.state, name) for name in run.state.networks()]
    gradients = [p.grad for network in networks for p in network.parameters() if p.grad is not None]
    held = [*(tensor for _, tensor in run.state.tensors()), *gradients, *(t for pair in batch for t in pair)]
    before = sum(tensor.nbytes for tensor in held)
    del gradients, held
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.advance(batch)
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = before
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"generator_width": 512, "ratio_width": 512, "batch_size": 256},
        {**BACKBONE, "batch_size": 48},
        {**BACKBONE, "batch_size": 48, "activation_checkpointing": True},
        {**BACKBONE, "batch_size": 64, "micro_batch": 24, "precision": "bfloat16"},
        {"backbone": "edm2:xs", "backbone_options": EDM2, "batch_size": 48},
        {"backbone_options": SONG, "batch_size": 48, "precision": "float64", "dropout": 0.1},
        {"backbone_options": SONG, "batch_size": 48, "augment_probability": 0.1},
        {**MIXER, "ratio_width": 128, "batch_size": 64},
        {**MIXER, "ratio_width": 64, "batch_size": 512, "precision": "bfloat16", "noise_draws": 3},
        {**MIXER, "ratio_width": 64, "batch_size": 256, "ratio_roll_probability": 0.5},
        {**MIXER, "ratio_width": 64, "batch_size": 64, "precision": "float64"},
    ],
    ids=[
        "mlp", "backbone", "checkpointing", "bfloat16", "edm2-pretraining", "float64-pretraining",
        "augmented-pretraining", "mixer", "mixer-bfloat16", "mixer-composed", "mixer-float64",
    ],
)  # fmt: skip
def test_the_estimate_is_what_the_allocator_counts(tmp_path: Path, options: dict[str, Any]) -> None:
    kind = TrainConfig if "generator" in options or "ratio_width" in options else PretrainConfig
    config = kind(device="cpu", **options)
    estimate = cost(config, open_dataset("digits"))
    assert estimate.peak == pytest.approx(measured_peak(config, tmp_path), rel=0.15)
    assert estimate.peak > estimate.state + estimate.gradients > 0


@pytest.mark.slow
def test_checkpointing_and_small_parts_take_less_and_flops_are_per_step() -> None:
    data = open_dataset("digits")
    plain = cost(TrainConfig(**BACKBONE, batch_size=64), data)
    parts = cost(TrainConfig(**BACKBONE, batch_size=64, micro_batch=8), data)
    again = cost(TrainConfig(**BACKBONE, batch_size=64, activation_checkpointing=True), data)
    assert parts.activations < plain.activations / 4 and again.activations < plain.activations / 2
    assert plain.flops < again.flops < 2 * plain.flops
    assert plain.flops < parts.flops < 1.5 * plain.flops  # one more generator pass
    assert plain.parameters["generator"] > plain.parameters["ratio network"] > 0


def test_flops_of_a_dense_step() -> None:
    """Counted by hand: 2 FLOPs a weight and image in each pass through a dense layer."""
    config = TrainConfig(
        batch_size=10, generator_width=32, generator_depth=2, latent_size=16, ratio_width=24, ratio_depth=1
    )
    generator, ratio = 16 * 32 + 32 * 32 + 32 * 64, 64 * 24 + 24 * 24 + 24
    conditioning = 32 * 64 + 64 * 24
    # generator: forward, and backward to weights, and to features except for the first layer
    passes = 2 * 10 * (3 * generator - 16 * 32)
    # ratio step, both halves: forward, to weights, to features but the first; forward, back to images
    passes += 2 * 20 * (3 * (ratio + conditioning) - 64 * 24 - 32 * 64)
    passes += 2 * 10 * (2 * ratio + conditioning)
    assert cost(config, open_dataset("digits")).flops == passes


@pytest.mark.parametrize("draws", [1, 3])
def test_flops_of_a_step_with_fused_operations(draws: int) -> None:
    """They count like their definition in plain PyTorch: a mixer's forward pass 1 + 2, 1 + 1 times."""
    config = TrainConfig(
        batch_size=10, generator_width=32, generator_depth=2, latent_size=16, ratio_network="mixer",
        ratio_width=24, ratio_depth=2, noise_draws=draws,
    )  # fmt: skip
    generator = 16 * 32 + 32 * 32 + 32 * 64
    tokens, patch, hidden = 16, 4, 48
    mixer = tokens * 24 * (patch + 2 * (tokens + 2 * hidden))
    conditioning = 32 * 64 + 64 * (24 + 2 * hidden)
    passes = 2 * 10 * (3 * generator - 16 * 32)
    passes += 2 * 20 * 3 * mixer + 2 * 10 * (3 * conditioning - 32 * 64)  # a pair shares its conditioning
    passes += 2 * 10 * draws * (2 * mixer + conditioning)
    assert cost(config, open_dataset("digits")).flops == passes


COUNTS = {
    "cifar10": 55.73, "cifar10-cond": 55.73, "imagenet64": 295.9, "imagenet512-xs": 124.7,
    "imagenet512-s": 280.2, "imagenet512-m": 497.8, "imagenet512-l": 777.5, "imagenet512-xl": 1119.3,
    "imagenet512-xxl": 1523.2,
}  # fmt: skip
"""Millions of parameters, as published."""


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds_the_network_it_names(preset: str) -> None:
    assert set(PRESETS) == set(PRETRAIN_PRESETS) == set(DESCRIPTIONS) == set(DATA_SHAPES)
    config = PretrainConfig(**PRETRAIN_PRESETS[preset])
    data, _ = planned_data(preset, config)
    with torch.device("meta"):
        network = build_denoiser(
            model_shape(data), len(data.class_names), config.backbone, config.backbone_arguments
        )
    if preset in COUNTS:
        parameters = sum(p.numel() for p in network.parameters()) / 1e6
        assert parameters == pytest.approx(COUNTS[preset], rel=1e-3)
    both = TrainConfig(**PRESETS[preset])
    if both.generator == "backbone":
        assert (both.backbone, both.backbone_options) == (config.backbone, config.backbone_options)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["digits", "fashion", "cifar10", "imagenet512-xs"])
def test_a_preset_has_a_plan(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    fits = ["--dry-run", "--device", "cpu", "--plan-memory", "80", "--batch-size", "2", "--micro-batch", "2"]
    assert (pretrain if preset == "cifar10" else train).main([preset, *fits]) == 0
    printed = capsys.readouterr().out
    assert ("denoiser  edm:ddpmpp, 55,733,891 parameters" in printed) == (preset == "cifar10")
    assert "FLOPs per step" in printed and "memory  about" in printed
    assert ("not there yet" in printed) == (preset != "digits")


@pytest.mark.parametrize("preset", ["fashion", "cifar10-cond", "imagenet64", "imagenet512-m"])
def test_a_mixer_fits_the_preset(preset: str) -> None:
    options = PRESETS[preset] | RATIO_NETWORKS[preset, "mixer"] | {"ratio_network": "mixer", "batch_size": 2}
    small = {"generator": "mlp", "generator_width": 8, "generator_depth": 1}  # this test is about the mixer
    config = TrainConfig(**(options | small | {"micro_batch": None}))
    data, there = planned_data(preset, config)
    assert not there and cost(config, data).parameters["ratio network"] > 10_000


@pytest.mark.slow
def test_what_cannot_fit_is_refused_with_advice(capsys: pytest.CaptureFixture[str]) -> None:
    options = ["fashion", "--dry-run", "--device", "cpu", "--batch-size", "64"]
    config = TrainConfig(**(PRESETS["fashion"] | {"batch_size": 64}))
    whole = cost(config, planned_data("fashion", config)[0])

    def refused(gibibytes: float) -> str:
        with pytest.raises(UserError) as error:
            train.main([*options, "--plan-memory", str(gibibytes)])
        assert "memory  about" in capsys.readouterr().out
        assert "\n" not in str(error.value)
        return str(error.value)

    printed = refused(whole.peak / 2**30 / 3)
    assert "--micro-batch" in printed and "would fit" in printed
    words = printed.rpartition("; ")[2].split(" would fit")[0].split()
    assert train.main([*options, "--plan-memory", str(whole.peak / 2**30 / 3), *words]) == 0
    assert "smaller preset" in refused(0.005)


def test_a_plan_of_nothing_that_is_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such data set"):
        train.main(["digits", "--data", str(tmp_path / "none"), "--dry-run"])


@pytest.mark.slow
def test_the_table_of_presets_has_what_was_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import preset_plans

    monkeypatch.setattr(preset_plans, "WARMUP", 1)
    monkeypatch.setattr(preset_plans, "TIMED", 2)
    monkeypatch.setattr(preset_plans, "LARGEST", {"cpu": 1e9})  # the denoiser of digits is above it
    file = tmp_path / "measured.json"
    threads = torch.get_num_threads()
    assert preset_plans.main(["digits", "--measure", str(file)]) == 0
    torch.set_num_threads(threads)
    content = json.loads(file.read_text())
    (found,) = content["rows"]
    assert found["op"] == "train" and found["batch_size"] == 128 and content["environment"]["torch"]
    assert found["images_per_s"] * found["median_s"] == pytest.approx(128)
    capsys.readouterr()
    assert preset_plans.main(["digits", "--measured", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert lines[2].endswith("| not measured |") and lines[3].endswith(f"| {found['images_per_s']:,.0f} |")
    file.write_text("{}")
    with pytest.raises(UserError, match="expected a file of --measure"):
        preset_plans.main(["digits", "--measured", str(file)])
