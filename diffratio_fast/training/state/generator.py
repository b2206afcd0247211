"""State of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast import networks
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet, model_shape
from diffratio_fast.errors import UserError
from diffratio_fast.networks.backbone import (
    BackboneGenerator,
    build_denoiser,
    set_checkpointing,
    set_dropout,
)
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.objectives.bin_means import initial_means
from diffratio_fast.training.processes.parallel import shard
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state.ema import averaged_copy
from diffratio_fast.training.state.initial import load_initial, load_teacher
from diffratio_fast.training.state.optimizers import make_optimizer
from diffratio_fast.training.state.posthoc_ema import kept_averages
from diffratio_fast.training.state.run_state import RunState, backbone_options, place
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
    """What learns online: the ratio network, or the student of score distillation in its place."""
    average: nn.Module
    generator_optimizer: torch.optim.Optimizer
    ratio_optimizer: torch.optim.Optimizer
    h_means: Tensor
    ratio_average: nn.Module | None = None
    kept: nn.ModuleList | None = None
    """Averages of the generator of other widths, for ``average``."""
    teacher: nn.Module | None = None
    """Of score distillation. It never changes, and is kept so that a run needs nothing but itself."""


def network_arguments(config: TrainConfig, dataset: DataSet) -> dict[str, dict[str, Any]]:
    """Constructor arguments of the run's generator and ratio network."""
    common = {"shape": model_shape(dataset), "classes": len(dataset.class_names)}
    if config.generator == "backbone" or config.ratio_network == "encoder":
        common |= {"backbone": config.backbone, "options": backbone_options(config)}
    return {
        "generator": common
        | {
            "latent_size": config.latent_size,
            "width": config.generator_width,
            "depth": config.generator_depth,
            "sigma_init": config.sigma_init,
            "bounds": dataset.scaling.bounds(),
        },
        "ratio": common
        | {
            "width": config.ratio_width,
            "depth": config.ratio_depth,
            "expansion": config.ratio_expansion,
            "patch": config.ratio_patch,
            "middle": config.ratio_middle,
            "pool": config.ratio_pool,
            "dropout": config.ratio_dropout,
        },
    }


def initial_state(
    config: TrainConfig,
    dataset: DataSet,
    device: torch.device,
    *,
    init: bool = True,
    planned: bool = False,
    world: World = ALONE,
) -> TrainState:
    """The state before the first step: networks drawn from the seed, or taken from ``config.init``.

    Without ``init`` ``config.init`` is not read (a checkpoint will replace the weights). A state that is only
    ``planned`` is on tensors without numbers: nothing is drawn or read. Each process of ``world`` may get a
    part of it (``parallel.shard``).
    """
    arguments = network_arguments(config, dataset)
    generator = _built("generator", config.generator, arguments["generator"])
    ratio: nn.Module
    teacher: Denoiser | None = None
    if config.objective == "vsd":
        ratio, teacher = (_denoiser(config, dataset) for _ in range(2))
    else:
        ratio = _built("ratio", config.ratio_network, arguments["ratio"])
    if not planned:
        networks.initialise(generator, config.seed, stream=0)
        networks.initialise(ratio, config.seed, stream=1)
        if init:
            _start(config, generator, ratio, teacher, dataset)
    for network in (generator, ratio, teacher):
        if network is not None:
            if not planned:
                place(config, network, device)
            set_checkpointing(network, config.activation_checkpointing)
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


def _built(role: str, architecture: str, arguments: dict[str, Any]) -> nn.Module:
    try:
        return networks.build(role, architecture, arguments)
    except ValueError as error:
        kind = "ratio network" if role == "ratio" else role
        raise UserError(f"{kind} {architecture}: {error}") from None


def _denoiser(config: TrainConfig, dataset: DataSet) -> Denoiser:
    """Teacher or student of score distillation, without dropout: both stand for a posterior mean."""
    try:
        denoiser = build_denoiser(
            model_shape(dataset), len(dataset.class_names), config.backbone, backbone_options(config)
        )
    except ValueError as error:
        raise UserError(f"denoiser {config.backbone}: {error}") from None
    set_dropout(denoiser, 0.0)
    return denoiser


def _start(
    config: TrainConfig, generator: nn.Module, ratio: nn.Module, teacher: Denoiser | None, dataset: DataSet
) -> None:
    """Give networks the weights that ``init`` and ``teacher`` name."""
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
