"""The state of a training run.

A step is a pure function of (state, step): all randomness comes from the noise contract, so the networks,
their average, the optimizers and a few running sums are all there is to keep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffratio_fast import networks
from diffratio_fast.command import UserError
from diffratio_fast.config import RunConfig, TrainConfig
from diffratio_fast.data import DataSet, model_shape
from diffratio_fast.networks.backbone import (
    BackboneGenerator,
    build_denoiser,
    set_checkpointing,
    set_dropout,
)
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.objectives.bin_means import initial_means
from diffratio_fast.training.distributed import ALONE, World, is_sharded
from diffratio_fast.training.ema import averaged_copy
from diffratio_fast.training.initial import load_initial, load_teacher
from diffratio_fast.training.optimizers import make_optimizer
from diffratio_fast.training.parallel import shard
from diffratio_fast.training.posthoc_ema import kept_averages
from diffratio_fast.training.watch import LOSS_JUMP, NORM_JUMP, Watched, initial_bad_steps, initial_statistics
from diffratio_fast.untrusted import parse_json

SUMS = ("ratio_loss", "correct_real", "correct_fake", "log_ratio_real", "log_ratio_fake", "clamped", "steps")
"""Sums over the steps since the last log line; a float64 tensor, read only when a line is written."""
WATCHED = (
    Watched("ratio loss", LOSS_JUMP),
    Watched("ratio network's gradient", NORM_JUMP),
    Watched("generator's gradient", NORM_JUMP),
)


@dataclass
class RunState:
    """What a run of any kind keeps: the names of its parts, and counters after ``step`` steps."""

    NETWORKS: ClassVar[tuple[str, ...]]
    OPTIMIZERS: ClassVar[tuple[str, ...]]
    TENSORS: ClassVar[tuple[str, ...]]
    """Names of attributes; a network that is None is not kept."""

    sums: Tensor = field(kw_only=True)
    statistics: Tensor = field(kw_only=True)
    bad_steps: Tensor = field(kw_only=True)
    step: int = field(default=0, kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)
    best: dict[str, Any] = field(default_factory=dict, kw_only=True)

    def networks(self) -> list[str]:
        """Names of the networks that the state has."""
        return [name for name in self.NETWORKS if getattr(self, name) is not None]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state under a unique name."""
        for part in self.networks():
            for name, tensor in getattr(self, part).state_dict().items():
                yield f"{part}.{name}", tensor
        for part in self.OPTIMIZERS:
            optimizer = getattr(self, part)
            for number, values in optimizer.state_dict()["state"].items():
                for name, tensor in values.items():
                    yield f"{part}.{number}.{name}", torch.as_tensor(tensor)
            if "step" in optimizer.param_groups[0]:  # apex counts there
                yield f"{part}.step", torch.as_tensor(optimizer.param_groups[0]["step"])
        for part in self.TENSORS:
            yield part, getattr(self, part)

    @property
    def sharded(self) -> bool:
        """Whether a process has only a part of each weight (of some network at least)."""
        return any(is_sharded(p) for name in self.networks() for p in getattr(self, name).parameters())

    def blank(self, sizes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
        """Tensors to read a checkpoint with tensors of these sizes and types into, for ``restore``."""
        tensors: dict[str, Tensor] = {}
        for part in self.networks():
            for name, tensor in getattr(self, part).state_dict().items():
                tensors[f"{part}.{name}"] = tensor
        for part in self.OPTIMIZERS:
            parameters = [p for group in getattr(self, part).param_groups for p in group["params"]]
            for name, (size, dtype) in sizes.items():
                owner, _, rest = name.partition(".")
                if owner != part:
                    continue
                number = rest.partition(".")[0]
                like = parameters[int(number)] if number != "step" else parameters[0]
                tensors[name] = (
                    torch.zeros_like(like)
                    if size and size == tuple(like.shape)
                    else torch.zeros(size, dtype=dtype, device=like.device)
                )
        return tensors | {part: getattr(self, part) for part in self.TENSORS}

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's tensors; what does not fit is a Key-, Runtime- or ``ValueError``."""
        parts: dict[str, dict[str, Tensor]] = {}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = tensor
        for part in self.networks():
            getattr(self, part).load_state_dict(parts[part])
        for part in self.OPTIMIZERS:
            optimizer = getattr(self, part)
            values: dict[int, dict[str, Tensor]] = {}
            groups = optimizer.state_dict()["param_groups"]
            for name, tensor in parts.get(part, {}).items():
                number, _, key = name.partition(".")
                if number == "step":
                    groups = [group | {"step": int(tensor)} for group in groups]
                else:
                    values.setdefault(int(number), {})[key] = tensor
            optimizer.load_state_dict({"state": values, "param_groups": groups})
        for part in self.TENSORS:
            getattr(self, part).copy_(parts[part][""])


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


def backbone_options(config: RunConfig) -> dict[str, Any]:
    """The options of the run's backbone; a ``UserError`` where they are no JSON object."""
    try:
        options = parse_json(config.backbone_options)
    except ValueError as error:
        raise UserError(f"backbone_options is not JSON: {error}") from None
    if not isinstance(options, dict):
        raise UserError(f"backbone_options must be a JSON object, not {config.backbone_options}")
    return options


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


def run_dtype(config: RunConfig) -> torch.dtype:
    """Of weights and images; bfloat16 is a matter of autocast."""
    return torch.float64 if config.precision == "float64" else torch.float32


def place(config: RunConfig, network: nn.Module, device: torch.device) -> None:
    """Bring a network to device, dtype and memory format as configured, in place."""
    network.to(device, run_dtype(config))
    if config.channels_last:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


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
