"""A captured step: the same numbers, from device operations only. ``Tape`` replaces the CUDA graph."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.helpers import SMALL, one_error_line, run
from support.tape import NothingIsWrong, Recorder

from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.errors import UserError
from diffratio_fast.training.kinds import KINDS
from diffratio_fast.training.state.run_state import RunState
from diffratio_fast.training.step.capture import WARMUP, Captured, check_capture

CPU = torch.device("cpu")


def trained(config: RunConfig, steps: int, recorder: Recorder | None) -> RunState:
    """The state after the given number of steps: ordinary ones or, with a recorder, captured ones."""
    dataset = open_dataset(config.data)
    stepper = KINDS[type(config)].new_iteration(config, dataset, CPU)
    step = stepper if recorder is None else Captured(stepper, recorder)
    source = dataset.batches("train", config.batch_size, seed=config.seed)
    with NothingIsWrong():
        for _ in range(steps):
            step.run([next(source) for _ in range(config.batches_per_step)])
    return stepper.state


UNET = '{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}'
SMALL_NETWORKS: dict[str, Any] = {
    "batch_size": 8, "generator_width": 16, "ratio_width": 16, "latent_size": 8, "precision": "float64",
}  # fmt: skip
CASES: dict[str, RunConfig] = {
    "plain": TrainConfig(**SMALL_NETWORKS),
    "warm-up, ramp, schedule": TrainConfig(
        **SMALL_NETWORKS, ratio_warmup_steps=5, generator_ramp_steps=4, lr_schedule="cosine", steps=30,
        lr_warmup_steps=3,
    ),
    "parts, several ratio steps": TrainConfig(
        **SMALL_NETWORKS, micro_batch=4, ratio_steps=2, ratio_ema_half_life_images=500.0,
    ),
    "augmentation": TrainConfig(
        **SMALL_NETWORKS, flip_probability=0.5, ratio_roll_probability=0.5, noise_draws=2, ema_std=0.1,
    ),
    "divergences that are clamped": TrainConfig(
        **SMALL_NETWORKS, divergence="jeffreys", weight="dmd", optimizer="adam",
    ),
    "mixer": TrainConfig(**SMALL_NETWORKS | {"precision": "float32"}, ratio_network="mixer", ratio_depth=2),
    "U-Net": TrainConfig(
        **SMALL_NETWORKS, generator="backbone", ratio_network="encoder", backbone_options=UNET,
        ratio_dropout=0.1,
    ),
    "denoiser": PretrainConfig(
        batch_size=8, backbone_options=UNET, precision="float64", dropout=0.1, lr_schedule="linear", steps=30,
    ),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_same_numbers(case: str) -> None:
    config = CASES[case]
    steps = 12
    ordinary = dict(trained(config, steps, None).tensors())
    recorder = Recorder()
    captured = trained(type(config)(**{**vars(config), "capture": True}), steps, recorder)
    variants = 2 if isinstance(config, TrainConfig) and config.ratio_warmup_steps else 1
    assert len(recorder.tapes) == variants
    assert recorder.replayed == steps - WARMUP * variants
    assert captured.step == steps
    exact = config.precision == "float32"
    moved = 0
    for name, tensor in captured.tensors():
        expected = ordinary[name]
        tolerance = 1e-6 if exact else 1e-12
        torch.testing.assert_close(tensor, expected, rtol=tolerance, atol=tolerance, msg=name)
        moved += not torch.equal(expected, torch.zeros_like(expected))
    assert moved > 10


def test_the_tape_repeats_what_python_decided() -> None:
    """The tool itself: a Python value is frozen, a value in memory is not, and a read raises an error."""
    step, memory, total = [1.0], torch.tensor(1.0), torch.zeros(())
    recorder = Recorder()
    replay = recorder.record(lambda: total.add_(memory * step[0]))  # type: ignore[arg-type, return-value]
    assert total == 0
    step[0] = 10.0
    memory.fill_(100.0)
    replay()
    assert total == 100.0
    with pytest.raises(AssertionError, match="captured step"):
        recorder.record(lambda: memory.item())  # type: ignore[arg-type, return-value]
    with pytest.raises(AssertionError, match="captured step"):
        recorder.record(lambda: torch.tensor([1.0]) + memory)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, "the device is cpu"),
        ({"on_nonfinite": "skip"}, "--on-nonfinite skip"),
        ({"optimizer": "apex"}, "--optimizer adamw"),
    ],
)
def test_unsupported_options_of_capture_raise(options: dict[str, Any], expected: str) -> None:
    device = torch.device("cuda" if options else "cpu")
    with pytest.raises(UserError, match=expected):
        check_capture(TrainConfig(capture=True, **options), device)
    check_capture(TrainConfig(**options), device)
    sharded = TrainConfig(capture=True, parallel="fsdp")
    with pytest.raises(UserError, match="--parallel ddp"):
        check_capture(sharded, torch.device("cuda"), processes=2)
    check_capture(sharded, torch.device("cuda"))
    check_capture(TrainConfig(capture=True), torch.device("cuda"), processes=2)


@pytest.mark.slow
def test_capture_on_a_cpu_leaves_nothing_behind(tmp_path: Path) -> None:
    line = one_error_line(run("train", *SMALL, "--capture", "--run-dir", "run", cwd=tmp_path))
    assert "--capture" in line and list(tmp_path.iterdir()) == []
