"""Training EDM2 networks with the fused operations: equal up to rounding, with exact resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.networks.edm2 import MPConv, force_normalization
from diffratio_fast.ops import parameters
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.run import Run
from diffratio_fast.training.state.fused_adam import FusedAdam

pytestmark = pytest.mark.skipif(not parameters.HAS_OPERATIONS, reason="the compiled module was not built")

EDM2: dict[str, Any] = {
    "device": "cpu", "batch_size": 8, "backbone": "edm2:xs",
    "backbone_options": json.dumps(
        {"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}
    ),
}  # fmt: skip
BOTH = {
    **EDM2, "generator": "backbone", "ratio_network": "encoder", "ratio_dropout": 0.1, "ratio_steps": 2,
    "ratio_ema_half_life_images": 100.0, "posthoc_ema": "0.05,0.10", "optimizer": "adam",
    "generator_weight_decay": 0.01,
}  # fmt: skip
KINDS = {"train": (Trainer, TrainConfig, BOTH), "pretrain": (Pretrainer, PretrainConfig, EDM2)}


def run_of(kind: str, where: Path, steps: int, **options: Any) -> Run:
    run, config, common = KINDS[kind]
    made = run("digits", config(**{**common, **options}), RunDirectory(where))
    batches = made.batches()
    for _ in range(steps):
        made.advance(next(batches))
    return made


def tensors(run: Run) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.tensors()}


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}], ids=["whole", "parts"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_training_is_ordinary_training_to_rounding(
    tmp_path: Path, kind: str, options: dict[str, Any]
) -> None:
    fused = run_of(kind, tmp_path / "a", 3, **options)
    plain = run_of(kind, tmp_path / "b", 3, fused="off", **options)
    optimizers = [getattr(fused.state, name) for name in fused.state.OPTIMIZERS]
    assert all(isinstance(optimizer, FusedAdam) for optimizer in optimizers)
    for name in plain.state.networks():  # the fused ones are normalized after an update, not before a pass
        force_normalization(getattr(plain.state, name))
    first, second = tensors(fused), tensors(plain)
    assert first.keys() == second.keys()
    for name, value in first.items():
        if value.is_floating_point() and not name.startswith("statistics"):
            torch.testing.assert_close(
                value, second[name], rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
            )


def test_bfloat16_training_stays_near_float32(tmp_path: Path) -> None:
    losses = []
    for number, options in enumerate(
        ({}, {"precision": "bfloat16"}, {"precision": "bfloat16", "fused": "off"})
    ):
        run = run_of("pretrain", tmp_path / str(number), 3, **options)
        losses.append(float(run.state.sums[0]))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[2] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_resumed_run_repeats_every_bit(tmp_path: Path, precision: str) -> None:
    options = {"precision": precision}
    run = run_of("train", tmp_path / "a", 2, **options)
    saved = tensors(run)
    batches = run.batches()
    run.advance(next(batches))
    other = run_of("train", tmp_path / "b", 0, **options)
    other.state.restore(saved)
    other.state.step = 2
    other.advance(next(other.batches()))
    first, second = tensors(run), tensors(other)
    assert all(torch.equal(value, second[name]) for name, value in first.items())


def test_either_way_reads_the_others_checkpoint(tmp_path: Path) -> None:
    for first, second in (("auto", "off"), ("off", "auto")):
        saved = tensors(run_of("pretrain", tmp_path / first, 2, fused=first))
        other = run_of("pretrain", tmp_path / f"{first}-{second}", 0, fused=second)
        other.state.restore(saved)
        other.state.step = 2
        other.advance(next(other.batches()))
        assert all(value.isfinite().all() for value in tensors(other).values())


def test_weights_are_normalized_once_an_update(tmp_path: Path) -> None:
    run = run_of("pretrain", tmp_path, 2, precision="bfloat16", micro_batch=2)
    layers = [m for m in run.state.denoiser.modules() if isinstance(m, MPConv)]  # type: ignore[attr-defined]
    for layer in layers:
        assert layer.kept is not None
        known = layer.kept.value(layer.weight, torch.bfloat16)
        assert known is not None
        assert torch.equal(known, parameters.normalize_weight(layer.weight.detach(), torch.bfloat16))
    before = layers[0].weight.detach().clone()
    force_normalization(run.state.denoiser)  # type: ignore[attr-defined]
    assert torch.equal(before, layers[0].weight)
    with torch.no_grad():
        layers[0].weight.mul_(2)
    assert layers[0].kept.value(layers[0].weight, torch.bfloat16) is None


def test_a_bad_update_is_skipped_or_reported(tmp_path: Path) -> None:
    for policy in ("skip", "stop"):
        run = run_of("pretrain", tmp_path / policy, 1, on_nonfinite=policy)
        printed: list[str] = []
        (check,) = run.iteration.checks.values()  # type: ignore[attr-defined]
        check.warn = printed.append
        before = tensors(run)
        weight = run.state.denoiser.unet.out_gain  # type: ignore[attr-defined]
        hook = weight.register_hook(lambda g: g * float("nan"))
        run.advance(next(run.batches()))
        hook.remove()
        if policy == "skip":
            assert len(printed) == 1 and "out_gain" in printed[0] and "skipped" in printed[0]
            after = tensors(run)
            assert all(torch.equal(v, after[n]) for n, v in before.items() if n.startswith("denoiser."))
        else:
            message = check.message()
            assert message is not None and "out_gain" in message
