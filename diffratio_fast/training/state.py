"""The state of a training run, and its checkpoint: one file, written atomically, read with a digest check.

A step is a pure function of (state, step): all randomness comes from the noise contract, so the networks,
their average, the optimizers and a few running sums are all there is to keep.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import xxhash
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffratio_fast import networks
from diffratio_fast.command import UserError
from diffratio_fast.config import TrainConfig
from diffratio_fast.data import DataSet
from diffratio_fast.files import replace_file
from diffratio_fast.objectives.bin_means import initial_means
from diffratio_fast.training.ema import averaged_copy

FORMAT = "diffratio_fast.checkpoint.1"
SUMS = ("ratio_loss", "correct_real", "correct_fake", "log_ratio_real", "log_ratio_fake", "clamped", "steps")
"""Sums over the steps since the last log line; a float64 tensor, read only when a line is written."""


@dataclass
class TrainState:
    """Networks, average, optimizers and counters of a run after ``step`` generator updates."""

    generator: nn.Module
    ratio: nn.Module
    average: nn.Module
    generator_optimizer: torch.optim.Optimizer
    ratio_optimizer: torch.optim.Optimizer
    h_means: Tensor
    sums: Tensor
    ratio_average: nn.Module | None = None
    step: int = 0
    seconds: float = 0.0
    best: dict[str, Any] = field(default_factory=dict)

    def networks(self) -> list[str]:
        """Names of the networks that the state has."""
        kept = [] if self.ratio_average is None else ["ratio_average"]
        return ["generator", "ratio", "average", *kept]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state under a unique name."""
        for part in self.networks():
            for name, tensor in getattr(self, part).state_dict().items():
                yield f"{part}.{name}", tensor
        for part in ("generator_optimizer", "ratio_optimizer"):
            for number, values in getattr(self, part).state_dict()["state"].items():
                for name, tensor in values.items():
                    yield f"{part}.{number}.{name}", torch.as_tensor(tensor)
        yield "h_means", self.h_means
        yield "sums", self.sums


def network_arguments(config: TrainConfig, dataset: DataSet) -> dict[str, dict[str, Any]]:
    """Constructor arguments of the run's generator and ratio network."""
    common = {"shape": tuple(dataset.shape), "classes": len(dataset.class_names)}
    bounds = dataset.scaling.bounds()
    return {
        "generator": common
        | {
            "latent_size": config.latent_size,
            "width": config.generator_width,
            "depth": config.generator_depth,
            "bounds": None if bounds is None else tuple(bound.tolist() for bound in bounds),
        },
        "ratio": common
        | {
            "width": config.ratio_width,
            "depth": config.ratio_depth,
            "expansion": config.ratio_expansion,
            "patch": config.ratio_patch,
        },
    }


def initial_state(config: TrainConfig, dataset: DataSet, device: torch.device) -> TrainState:
    """The state before the first step: networks drawn from the seed, or taken from ``config.init``."""
    arguments = network_arguments(config, dataset)
    generator = networks.build("generator", config.generator, arguments["generator"])
    try:
        ratio = networks.build("ratio", config.ratio_network, arguments["ratio"])
    except ValueError as error:
        raise UserError(f"ratio network {config.ratio_network}: {error}") from None
    networks.initialise(generator, config.seed, stream=0)
    networks.initialise(ratio, config.seed, stream=1)
    if config.init is not None:
        _load_initial(Path(config.init), generator, ratio)
    dtype = torch.float64 if config.precision == "float64" else torch.float32
    generator.to(device, dtype)
    ratio.to(device, dtype)
    return TrainState(
        generator,
        ratio,
        averaged_copy(generator),
        _optimizer(config, generator, config.generator_lr, config.generator_weight_decay),
        _optimizer(config, ratio, config.ratio_lr, config.ratio_weight_decay),
        initial_means(device),
        torch.zeros(len(SUMS), dtype=torch.float64, device=device),
        None if config.ratio_ema_half_life_images is None else averaged_copy(ratio),
    )


def _load_initial(source: Path, generator: nn.Module, ratio: nn.Module) -> None:
    """Copy published weights: both networks of a run directory, or a generator's file alone."""
    pairs = [("generator", generator, source)]
    if source.is_dir():
        pairs = [("generator", generator, source / "generator.safetensors")]
        pairs.append(("ratio", ratio, source / "ratio.safetensors"))
    for role, network, path in pairs:
        loaded, _ = networks.load(path, role)
        try:
            network.load_state_dict(loaded.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"--init {path}: another architecture than this run's ({reason[:200]})") from None


def _optimizer(config: TrainConfig, network: nn.Module, rate: float, decay: float) -> torch.optim.Optimizer:
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[config.optimizer]
    betas = (config.beta1, config.beta2)
    return kind(network.parameters(), lr=rate, betas=betas, weight_decay=decay, fused=True)


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = xxhash.xxh3_128()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_checkpoint(path: Path, state: TrainState) -> None:
    """Write the whole state to ``path``; the file that was there stays until the new one is complete."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors()}
    about = {
        "step": state.step,
        "seconds": state.seconds,
        "best": state.best,
        "digest": _digest(tensors),
    }
    metadata = {"format": FORMAT, "about": json.dumps(about)}
    replace_file(path, safetensors.torch.save(tensors, metadata))


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Bring ``state`` to the one saved in ``path``; a damaged file is a ``UserError`` and left as it is."""
    advice = "restore that file from a copy, or start over with --fresh"
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise UserError(f"{path}: not a checkpoint of this version of diffratio_fast; {advice}")
            about = json.loads(metadata["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        intact = _digest(tensors) == about["digest"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path}: the checkpoint is damaged ({error}); {advice}") from None
    if not intact:
        raise UserError(f"{path}: the checkpoint is damaged (its digest does not match); {advice}")
    try:
        _restore(state, tensors)
    except (KeyError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: the checkpoint does not fit this run ({reason[:200]}); {advice}") from None
    state.step, state.seconds, state.best = about["step"], about["seconds"], about["best"]


def _restore(state: TrainState, tensors: dict[str, Tensor]) -> None:
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts.setdefault(part, {})[rest] = tensor
    for part in state.networks():
        getattr(state, part).load_state_dict(parts[part])
    for part in ("generator_optimizer", "ratio_optimizer"):
        optimizer = getattr(state, part)
        values: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts.get(part, {}).items():
            number, _, key = name.partition(".")
            values.setdefault(int(number), {})[key] = tensor
        optimizer.load_state_dict({"state": values, "param_groups": optimizer.state_dict()["param_groups"]})
    state.h_means.copy_(parts["h_means"][""])
    state.sums.copy_(parts["sums"][""])
