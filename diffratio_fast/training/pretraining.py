"""Pre-training runs: a denoiser by the EDM or EDM2 objective, whose result initialises ``train``."""

from __future__ import annotations

import json
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast import networks, ops
from diffratio_fast.command import UserError
from diffratio_fast.config import PretrainConfig
from diffratio_fast.data import DataSet, Scaling, model_shape
from diffratio_fast.images import grid, png, viewable
from diffratio_fast.networks.backbone import build_denoiser, set_checkpointing, set_dropout
from diffratio_fast.networks.edm2 import EDM2Denoiser
from diffratio_fast.networks.layers import dropout_stream
from diffratio_fast.networks.published import save_published
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.objectives import geometric
from diffratio_fast.objectives.denoising import DenoiserCall, denoising_errors, denoising_loss, heun
from diffratio_fast.objectives.noise_laws import parse_noise_law, sample_sigma
from diffratio_fast.presets import PRESETS
from diffratio_fast.training import runner
from diffratio_fast.training.capture import stepping
from diffratio_fast.training.distributed import ALONE, World
from diffratio_fast.training.ema import average_decay, averaged_copy, update_average
from diffratio_fast.training.finite import FiniteCheck
from diffratio_fast.training.initial import load_denoiser
from diffratio_fast.training.iteration import Batch, Stepper, learning_rate_factor
from diffratio_fast.training.optimizers import make_optimizer, set_rate
from diffratio_fast.training.parallel import Parallel, shard
from diffratio_fast.training.posthoc_ema import (
    averages_by_width,
    kept_averages,
    kept_weights,
    stored,
    update_kept,
)
from diffratio_fast.training.reporting import figure
from diffratio_fast.training.run_directory import RunDirectory
from diffratio_fast.training.state import RunState, backbone_options, place
from diffratio_fast.training.watch import (
    LOSS_JUMP,
    NORM_JUMP,
    Watch,
    Watched,
    initial_bad_steps,
    initial_statistics,
)

SUMS = ("loss", "error", "steps")
WATCHED = (Watched("loss", LOSS_JUMP), Watched("gradient", NORM_JUMP))
HELD_OUT = 512
"""Validation images behind a validation loss, at most."""
GRID_SEED = 1
GRID_ROWS, GRID_COLUMNS = 10, 8


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
    """The state before the first step; see ``state.initial_state``."""
    options = backbone_options(config)
    if config.augment_probability:
        if dataset.kind != "image":
            raise UserError("--augment-probability is for images: latents cannot be turned or scaled")
        options.setdefault("augment_dim", geometric.LABELS)
    try:
        denoiser = build_denoiser(model_shape(dataset), len(dataset.class_names), config.backbone, options)
    except ValueError as error:
        raise UserError(f"denoiser {config.backbone}: {error}") from None
    if config.augment_probability and options["augment_dim"] != geometric.LABELS:
        raise UserError(f"--augment-probability needs augment_dim {geometric.LABELS} of the backbone")
    if not planned:
        networks.initialise(denoiser, config.seed, stream=0)
        if config.init is not None and init:
            _start_from(Path(config.init), denoiser, dataset)
        place(config, denoiser, device)
    set_dropout(denoiser, config.dropout)
    set_checkpointing(denoiser, config.activation_checkpointing)
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


class PretrainIteration(Stepper):
    """The pure function (state, step, batch) -> state of a pre-training step."""

    state: PretrainState

    def __init__(
        self,
        config: PretrainConfig,
        scaling: Scaling,
        state: PretrainState,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        super().__init__(config, scaling, state.step, device, world)
        self.config: PretrainConfig = config
        self.state = state
        self.law = parse_noise_law(config.noise)
        self.denoiser = self.in_precision(state.denoiser)
        self.average = self.in_precision(state.average)
        self.loss_of = Parallel(state.denoiser, self._loss, world, config)
        skip = config.on_nonfinite == "skip"
        self.check = FiniteCheck("denoiser", state.denoiser, skip=skip, world=world)
        self.watch = Watch(WATCHED, state.statistics, state.bad_steps)

    def settle(self, batch: Batch) -> None:
        """See ``Iteration.settle``."""
        self.state.denoiser.eval()
        loss, _ = self.loss_of(*self.part(batch, self.parts[0]))
        (loss * 0).backward()
        self.state.optimizer.zero_grad(set_to_none=True)

    def begin(self) -> None:
        config, step = self.config, self.state.step
        self.rng[1].fill_(step)
        set_rate(self.state.optimizer, config.lr * learning_rate_factor(config, step))
        self.set("average", 1 - average_decay(config, step, step))
        for name, weight in kept_weights(config, step).items():
            self.set(name, weight)

    def compute(self, batches: list[Batch], variant: Hashable) -> None:
        state = self.state
        (batch,) = batches
        state.denoiser.train()
        self.loss_of.prepare()
        state.optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in self.parts:
            x0, labels, index = self.part(batch, part)
            with (
                dropout_stream(state.denoiser, self.rng, index),
                self.loss_of.part(last=self.is_last(part)),
            ):
                loss, error = self.loss_of(x0, labels, index)
                (loss * self.share(index)).backward()
            means += torch.stack((loss.detach().double(), error)) * self.share(index)
        self.world.mean(means)
        state.sums[:2] += means
        state.sums[2] += 1
        allowed = self.check.allows(self.rng[1], {"the loss": means[0]})
        self.watch.note(self.check.latest)
        if allowed:
            state.optimizer.step()
            update_average(state.average, state.denoiser, self.numbers["average"])
            update_kept(self.config, state.kept, state.denoiser, self.numbers)

    def _loss(self, x0: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of a part of a batch, and its mean error (float64, detached)."""
        sigma = sample_sigma(self.law, self.rng, index, ops.Purpose.DENOISING_SIGMA)[0][:, 0].to(self.dtype)
        denoiser, x0 = self._augmented(x0, index)
        errors = denoising_errors(denoiser, x0, sigma, labels, self.rng, index, ops.Purpose.DENOISING_NOISE)
        return denoising_loss(errors, self._log_variance(sigma)), errors.detach().double().mean()

    def _augmented(self, x0: Tensor, index: Tensor) -> tuple[DenoiserCall, Tensor]:
        """The images after their random transforms, and the denoiser told of those."""
        probability = self.config.augment_probability
        if probability == 0:
            return self.denoiser, x0
        transform = geometric.random_transform(self.rng, index, probability)
        told = transform.labels().to(x0.dtype)
        return lambda x, sigma, labels: self.denoiser(x, sigma, labels, told), geometric.apply(transform, x0)

    def _log_variance(self, sigma: Tensor) -> Tensor | None:
        denoiser = self.state.denoiser
        return denoiser.log_variance(sigma) if isinstance(denoiser, EDM2Denoiser) else None

    @torch.no_grad()
    def validation_error(self, held_out: Batch) -> float:
        """The mean weighted error of the average over held-out images; the same noise every time."""
        rng = ops.make_rng(self.config.seed, 0, self.device)
        total = 0.0
        x0, labels = held_out
        for chosen in torch.arange(len(labels), device=self.device).split(self.parts[0].stop):
            sigma = sample_sigma(self.law, rng, chosen, ops.Purpose.EVALUATION_SIGMA)[0][:, 0]
            errors = denoising_errors(
                self.average, x0[chosen], sigma.to(self.dtype), labels[chosen], rng, chosen,
                ops.Purpose.EVALUATION_REAL,
            )  # fmt: skip
            total += float(errors.double().sum())
        return total / len(labels)


class Pretrainer(runner.Run):
    """One pre-training run."""

    def __init__(
        self,
        preset: str,
        config: PretrainConfig,
        directory: RunDirectory,
        *,
        world: World = ALONE,
        started: bool = False,
    ) -> None:
        super().__init__(preset, config, directory, world=world, started=started)
        self.config: PretrainConfig = config
        with world.together():
            self.state: PretrainState = initial_state(
                config, self.dataset, self.device, init=not started, world=world
            )
        self.iteration = PretrainIteration(config, self.dataset.scaling, self.state, self.device, world)
        self.whole: PretrainState | None = self.state
        self.measured = self.iteration
        if self.state.sharded:
            self.whole = None
            if world.main:
                self.whole = initial_state(config, self.dataset, self.device, init=False)
                self.measured = PretrainIteration(config, self.dataset.scaling, self.whole, self.device)
        self.checks, self.watch = [self.iteration.check], self.iteration.watch
        self.step = stepping(config, self.iteration)

    def settle(self, batch: Batch) -> None:
        self.iteration.settle(batch)

    def figures(self) -> dict[str, Any]:
        loss, error, steps = self.state.sums.tolist()
        return {
            "loss": loss / steps,
            "error": error / steps,
            "gradient_norm": float(self.iteration.check.gradient_norm),
            "lr": float(self.state.optimizer.param_groups[0]["lr"]),
        }

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        return {name: figure(values[name]) for name in ("loss", "error")}

    @cached_property
    def _held_out(self) -> Batch:
        count = min(HELD_OUT, self.config.eval_images or HELD_OUT)
        return self.iteration.to_device(self.dataset.first("validation", count))

    def evaluate(self) -> None:
        state = self.state
        error = self.measured.validation_error(self._held_out)
        self.record({"step": state.step, "validation_error": error})
        self.progress.say(f"step {state.step:>6}: weighted error on the validation split {error:.4f}")
        if not state.best or error < state.best["validation_error"]:
            state.best = {"step": state.step, "validation_error": error}
        self.picture(self._grid_png())

    def _grid_png(self) -> bytes:
        rows = min(len(self.dataset.class_names), GRID_ROWS)
        columns = max(1, min(GRID_COLUMNS, (self.config.eval_images or HELD_OUT) // rows))
        labels = torch.arange(rows, device=self.device).repeat_interleave(columns)
        rng = ops.make_rng(GRID_SEED, 0, self.device)
        index = torch.arange(len(labels), device=self.device)
        noise = ops.normal(rng, index, model_shape(self.dataset), ops.Purpose.SAMPLE_LATENT).to(
            self.iteration.dtype
        )
        images = heun(self.measured.average, noise, labels)
        return png(grid(viewable(images, self.dataset.scaling), columns))

    def snapshot(self, name: str) -> None:
        self._save(self.directory.snapshots / f"denoiser-{name}.safetensors", self.measured.state.average)
        self._keep_averages()

    def _keep_averages(self) -> None:
        """Write the averages of ``posthoc_ema`` under ``snapshots/``."""
        state = self.measured.state
        for width, average in averages_by_width(self.config, state.kept, state.average).items():
            path = self.directory.kept_average(width, state.step)
            network = stored(self.config, average)
            self._save(path, network, ema_std=str(width), ema_updates=str(state.step))

    def _save(self, path: Path, network: nn.Module, **more: str) -> None:
        about = {
            "data": self.dataset.name,
            "class_names": json.dumps(list(self.dataset.class_names)),
            "scaling": json.dumps(vars(self.dataset.scaling)),
            "step": str(self.state.step),
            "images": str(self.state.step * self.config.batch_size),
        }
        assert isinstance(network, Denoiser)
        save_published(path, network, about | more)

    def results(self) -> dict[str, Any]:
        self._save(self.directory.denoiser, self.measured.state.average)
        self._keep_averages()
        return {
            "validation_error": self.measured.validation_error(self._held_out),
            "evaluation_images": len(self._held_out[1]),
            "best": self.state.best,
        }


def pretrain(preset: str, config: PretrainConfig, *, fresh: bool = False) -> int:
    """Run or continue the pre-training that ``config`` describes; the process's exit status."""
    root = Path(config.run_dir or f"runs/{preset}-denoiser")
    if runner.run(Pretrainer, preset, config, root, fresh=fresh) is not None:
        chosen = "" if PRESETS[preset].get("generator") else " --generator backbone --ratio-network encoder"
        print(f"  look: {root / 'samples'}")
        print(f"  train: python -m diffratio_fast.train {preset}{chosen} --init {root}")
    return 0
