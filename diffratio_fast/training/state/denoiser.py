"""State of a pre-training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from diffratio_fast import networks
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.errors import UserError
from diffratio_fast.networks.backbone import set_checkpointing, set_dropout, set_fused
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.objectives import geometric
from diffratio_fast.training.processes.parallel import shard
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state import builders
from diffratio_fast.training.state.ema import averaged_copy
from diffratio_fast.training.state.initial import load_denoiser
from diffratio_fast.training.state.optimizers import make_optimizer
from diffratio_fast.training.state.posthoc_ema import kept_averages
from diffratio_fast.training.state.run_state import RunState, place
from diffratio_fast.training.state.watch import (
    LOSS_JUMP,
    NORM_JUMP,
    Watched,
    initial_bad_steps,
    initial_statistics,
)

SUMS = ("loss", "error", "steps")
WATCHED = (Watched("loss", LOSS_JUMP), Watched("gradient", NORM_JUMP))


@dataclass
class PretrainState(RunState):
    """Denoiser, average, optimizer and counters of a run."""

    NETWORKS = ("denoiser", "average", "kept")
    OPTIMIZERS = ("optimizer",)
    TENSORS = ("sums", "statistics", "bad_steps")

    denoiser: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    kept: nn.ModuleList | None = None
    """Averages of other widths, for ``average``."""


def initial_state(
    config: PretrainConfig,
    dataset: DataSet,
    device: torch.device,
    *,
    init: bool = True,
    planned: bool = False,
    world: World = ALONE,
) -> PretrainState:
    """The state before the first step; see ``state.generator.initial_state``."""
    augment: dict[str, int] = {}
    if config.augment_probability:
        if dataset.kind != "image":
            raise UserError(
                "--augment-probability: latents cannot be rotated or scaled; use it with images only"
            )
        augment = {"augment_dim": geometric.LABELS}
        if config.backbone_arguments.get("augment_dim", geometric.LABELS) != geometric.LABELS:
            raise UserError(
                f"--augment-probability: the backbone needs augment_dim {geometric.LABELS}; set it in "
                "--backbone-options"
            )
    denoiser = builders.backbone(config, dataset, **augment)
    if not planned:
        networks.initialize(denoiser, config.seed, stream=0)
        if config.init is not None and init:
            _start_from(Path(config.init), denoiser, dataset)
        place(config, denoiser, device)
    set_dropout(denoiser, config.dropout)
    set_checkpointing(denoiser, config.activation_checkpointing)
    set_fused(denoiser, config.fused == "auto")
    average, kept = averaged_copy(denoiser), kept_averages(config, denoiser)
    for network in (denoiser, average, *(kept or [])):
        shard(network, world, config, device)
    return PretrainState(
        denoiser,
        average,
        make_optimizer(config, denoiser, config.lr, config.weight_decay, planned),
        kept,
        sums=torch.zeros(len(SUMS), dtype=torch.float64, device=device),
        statistics=initial_statistics(len(WATCHED), device),
        bad_steps=initial_bad_steps(device),
    )


def _start_from(source: Path, denoiser: Denoiser, dataset: DataSet) -> None:
    try:
        denoiser.load_state_dict(load_denoiser(source, dataset).state_dict())
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"--init {source}: another network than this run's ({reason[:200]})") from None
