"""State of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffratio_fast import networks
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.networks.backbone import BackboneGenerator, set_checkpointing, set_fused
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.objectives.bin_means import initial_means
from diffratio_fast.training.processes.parallel import shard
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state import builders
from diffratio_fast.training.state.ema import averaged_copy
from diffratio_fast.training.state.initial import check_initial, load_initial, load_teacher
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

SUMS = ("ratio_loss", "correct_real", "correct_fake", "log_ratio_real", "log_ratio_fake", "clamped", "steps")
"""Sums over the steps since the last log line; a float64 tensor, read only when a line is written."""

WATCHED = (
    Watched("ratio loss", LOSS_JUMP),
    Watched("ratio network's gradient", NORM_JUMP),
    Watched("generator's gradient", NORM_JUMP),
)


@dataclass
class TrainState(RunState):
    """Networks, average, optimizers and counters of a run after ``step`` generator updates."""

    NETWORKS = ("generator", "ratio", "average", "ratio_average", "kept", "teacher")
    OPTIMIZERS = ("generator_optimizer", "ratio_optimizer")
    TENSORS = ("h_means", "sums", "statistics", "bad_steps")

    generator: nn.Module
    ratio: nn.Module
    """The online network (``config.objectives``): a ratio network, or a student denoiser."""
    average: nn.Module
    generator_optimizer: torch.optim.Optimizer
    ratio_optimizer: torch.optim.Optimizer
    h_means: Tensor
    ratio_average: nn.Module | None = None
    kept: nn.ModuleList | None = None
    """Averages of the generator of other widths, for ``average``."""
    teacher: nn.Module | None = None
    """A frozen denoiser. The checkpoint stores it, so that a run can be resumed from its directory alone."""


def initial_state(
    config: TrainConfig,
    dataset: DataSet,
    device: torch.device,
    *,
    init: bool = True,
    planned: bool = False,
    world: World = ALONE,
) -> TrainState:
    """The initial state: networks drawn from the seed, or loaded from ``config.init``.

    With ``init=False``, ``config.init`` is not read (a checkpoint replaces the weights). A ``planned`` state
    has fake tensors: nothing is drawn or read. The state may be sharded over the processes of ``world``
    (``parallel.shard``).
    """
    u_net = config.generator == "backbone" or config.ratio_network == "encoder"
    if init and not planned and config.init is not None and u_net:
        check_initial(Path(config.init), config, dataset)
    generator, ratio = builders.generator(config, dataset), config.row.load("network")(config, dataset)
    teacher = builders.denoiser(config, dataset) if config.row.has_teacher else None
    if not planned:
        networks.initialize(generator, config.seed, stream=0)
        networks.initialize(ratio, config.seed, stream=1)
        if init:
            _start(config, generator, ratio, teacher, dataset)
    for network in (generator, ratio, teacher):
        if network is not None:
            if not planned:
                place(config, network, device)
            set_checkpointing(network, config.activation_checkpointing)
            set_fused(network, config.fused == "auto")
    if teacher is not None:
        teacher.eval().requires_grad_(False)
    average = averaged_copy(generator)
    ratio_average = None if config.ratio_ema_half_life_images is None else averaged_copy(ratio)
    kept = kept_averages(config, generator)
    for part in (generator, ratio, average, ratio_average, teacher, *(kept or [])):
        if part is not None:
            shard(part, world, config, device)
    return TrainState(
        generator,
        ratio,
        average,
        make_optimizer(config, generator, config.generator_lr, config.generator_weight_decay, planned),
        make_optimizer(config, ratio, config.ratio_lr, config.ratio_weight_decay, planned),
        initial_means(device),
        ratio_average,
        kept,
        teacher,
        sums=torch.zeros(len(SUMS), dtype=torch.float64, device=device),
        statistics=initial_statistics(len(WATCHED), device),
        bad_steps=initial_bad_steps(device),
    )


def _start(
    config: TrainConfig, generator: nn.Module, ratio: nn.Module, teacher: Denoiser | None, dataset: DataSet
) -> None:
    """Load the weights of ``init`` and ``teacher`` into the networks."""
    chosen = config.init_networks
    if config.init is not None and (teacher is None or isinstance(generator, BackboneGenerator)):
        load_initial(
            Path(config.init),
            generator if chosen != "ratio" else None,
            ratio if chosen != "generator" and teacher is None else None,
            dataset,
        )
    if teacher is not None:
        assert isinstance(ratio, Denoiser)
        load_teacher(Path(config.teacher or config.init or ""), (teacher, ratio), dataset)
