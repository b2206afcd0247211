"""The optimizers of a run."""

from __future__ import annotations

import struct
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError
from diffratio_fast.ops.parameters import MAX_AVERAGES
from diffratio_fast.training.state import fused_adam


def make_optimizer(
    config: RunConfig, network: nn.Module, rate: float, decay: float, planned: bool = False
) -> torch.optim.Optimizer:
    """The configured optimizer of a network's parameters, with one fused update."""
    parameters = list(network.parameters())
    settings: dict[str, Any] = {
        "lr": rate, "betas": (config.beta1, config.beta2), "weight_decay": decay
    }  # fmt: skip
    if planned:
        return PlannedAdam(parameters, settings)
    if config.optimizer == "apex":
        return _apex()(parameters, **settings, adam_w_mode=True)
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    if config.capture:  # a graph reads the learning rate from device memory
        settings["lr"] = torch.tensor(rate, dtype=torch.float32, device=parameters[0].device)
    averages = 1 + len(config.posthoc_widths)
    if config.fused == "auto" and averages <= MAX_AVERAGES and fused_adam.supports(network):
        dtype = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        return fused_adam.FusedAdam(
            network, settings, decoupled=config.optimizer == "adamw", dtype=None if config.compile else dtype
        )
    if config.capture:
        settings["capturable"] = True
    return kind(parameters, **settings, fused=True)


def _apex() -> Any:
    try:
        from apex.optimizers import FusedAdam
    except ImportError as error:
        raise UserError(
            f"--optimizer apex: NVIDIA apex with its CUDA extensions is not installed ({error}); use "
            "--optimizer adamw, PyTorch's fused Adam"
        ) from None
    return FusedAdam


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate, rounded to float32 as in a kernel that reads it from device memory."""
    rounded = struct.unpack("f", struct.pack("f", rate))[0]
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rounded)
        else:
            group["lr"] = rounded


class PlannedAdam(torch.optim.Optimizer):
    """Adam for planning: it allocates the memory of Adam and computes nothing."""

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    moments: dict[str, Tensor] = {
                        name: torch.empty_like(parameter) for name in ("exp_avg", "exp_avg_sq")
                    }
                    self.state[parameter].update(moments)
