"""``--capture`` on a GPU: the same weights as ordinary steps, and no synchronization with the device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.training import denoiser_run
from diffratio_fast.training.state.generator import initial_state
from diffratio_fast.training.state.run_state import RunState
from diffratio_fast.training.step.capture import stepping
from diffratio_fast.training.step.generator import Iteration
from diffratio_fast.training.step.stepper import Stepper

pytestmark = pytest.mark.requires_cuda

UNET = '{"model_channels": 32, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]}'
SMALL: dict[str, Any] = {"batch_size": 32, "device": "cuda"}
CASES: dict[str, RunConfig] = {
    "mlp": TrainConfig(**SMALL, ratio_warmup_steps=5, generator_ramp_steps=4, lr_schedule="cosine", steps=40),
    "mixer": TrainConfig(**SMALL, ratio_network="mixer", ratio_depth=2, ratio_width=64),
    "parts": TrainConfig(**SMALL, micro_batch=16, ratio_steps=2, flip_probability=0.5),
    "U-Net in bfloat16": TrainConfig(
        **SMALL, generator="backbone", ratio_network="encoder", backbone_options=UNET, precision="bfloat16",
    ),
    "denoiser": PretrainConfig(**SMALL, backbone_options=UNET, dropout=0.1),
}  # fmt: skip
STEPS = 20


def trained(config: RunConfig, *, refuse_waiting: bool = False) -> RunState:
    device = torch.device("cuda")
    dataset = open_dataset("digits", device=device)
    stepper: Stepper
    if isinstance(config, TrainConfig):
        stepper = Iteration(config, dataset.scaling, initial_state(config, dataset, device), device)
    else:
        assert isinstance(config, PretrainConfig)
        state = denoiser_run.initial_state(config, dataset, device)
        stepper = denoiser_run.PretrainIteration(config, dataset.scaling, state, device)
    step = stepping(config, stepper)
    per_step = config.ratio_steps if isinstance(config, TrainConfig) else 1
    source = dataset.batches("train", config.batch_size, seed=0)
    for number in range(STEPS):
        batches = [next(source) for _ in range(per_step)]
        torch.cuda.set_sync_debug_mode("error" if refuse_waiting and number > 8 else "default")
        try:
            step.run(batches)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    return stepper.state


@pytest.fixture(autouse=True)
def _deterministic():
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("case", CASES)
def test_captured_steps_give_the_weights_of_ordinary_ones(case: str) -> None:
    config = CASES[case]
    ordinary = dict(trained(config, refuse_waiting=True).tensors())
    captured = trained(type(config)(**{**vars(config), "capture": True}), refuse_waiting=True)
    for name, tensor in captured.tensors():
        torch.testing.assert_close(tensor, ordinary[name], rtol=1e-5, atol=1e-6, msg=name)
