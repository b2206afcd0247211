"""Pre-training runs: a denoiser with the objective of EDM or EDM2, for ``train --init``."""

from __future__ import annotations

import json
import shlex
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffratio_fast import ops
from diffratio_fast.config.options import flag
from diffratio_fast.config.presets import PRESETS
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.run import U_NET_SIZES
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet, model_shape
from diffratio_fast.data.pictures import grid, png, viewable
from diffratio_fast.networks.published import save_published
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.objectives.denoising import heun
from diffratio_fast.progress import format_metric
from diffratio_fast.training.beginning import ORDINARY, Beginning
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.run import Run, run
from diffratio_fast.training.state.denoiser import PretrainState, initial_state
from diffratio_fast.training.state.posthoc_ema import averages_by_width, stored
from diffratio_fast.training.step.denoiser import PretrainIteration
from diffratio_fast.training.step.stepper import Batch

HELD_OUT = 512
"""Maximum number of validation images for the validation loss."""
GRID_SEED = 1
GRID_ROWS, GRID_COLUMNS = 10, 8


class Pretrainer(Run):
    """One pre-training run."""

    TRAINS_DENOISER = True
    config: PretrainConfig
    iteration: PretrainIteration
    measured: PretrainIteration

    @classmethod
    def new_iteration(
        cls,
        config: PretrainConfig,
        dataset: DataSet,
        device: torch.device,
        *,
        init: bool = True,
        planned: bool = False,
        world: World = ALONE,
    ) -> PretrainIteration:
        state = initial_state(config, dataset, device, init=init, planned=planned, world=world)
        return PretrainIteration(config, dataset.scaling, state, device, world)

    @property
    def state(self) -> PretrainState:
        return self.iteration.state

    def figures(self) -> dict[str, Any]:
        loss, error, steps = self.state.sums.tolist()
        return {
            "loss": loss / steps,
            "error": error / steps,
            "gradient_norm": float(self.iteration.checks["denoiser"].gradient_norm),
            "lr": float(self.state.optimizer.param_groups[0]["lr"]),
        }

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        return {name: format_metric(values[name]) for name in ("loss", "error")}

    @cached_property
    def _held_out(self) -> Batch:
        count = min(HELD_OUT, self.config.eval_images or HELD_OUT)
        return self.iteration.to_device(self.dataset.first("validation", count))

    def evaluate(self) -> None:
        state = self.state
        error = self.measured.validation_error(self._held_out)
        self.record({"step": state.step, "validation_error": error})
        self.progress.print(f"step {state.step:>6}: weighted error on the validation split {error:.4f}")
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
        names = self.dataset.class_names[:rows] if rows > 1 else ()
        return png(grid(viewable(images, self.dataset.scaling), columns, labels=names))

    def snapshot(self) -> None:
        self._save(self.directory.snapshot("denoiser", self.state.step), self.measured.state.average)
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
        save_published(path, network, about | more, root=self.directory.root)

    def results(self) -> dict[str, Any]:
        self._save(self.directory.denoiser, self.measured.state.average)
        self._keep_averages()
        return {
            "validation_error": self.measured.validation_error(self._held_out),
            "evaluation_images": len(self._held_out[1]),
            "best": self.state.best,
        }


CARRIED = ("data", "class_conditional", "backbone", "backbone_options", *U_NET_SIZES, "device", "threads")
"""Options that ``train --init`` needs as pre-training had them."""


def train_command(preset: str, config: PretrainConfig, root: Path) -> str:
    """The command that trains a generator from the denoiser in ``root``."""
    theirs = PRESETS[preset]
    words = [f"python -m diffratio_fast.train {preset}"]
    if not theirs.get("generator"):
        words.append("--generator backbone --ratio-network encoder")
    for name in CARRIED:
        value = getattr(config, name)
        if value == theirs.get(name, TrainConfig.default(name)):
            continue
        if isinstance(value, bool):
            words.append(flag(name) if value else flag(f"no_{name}"))
        else:
            words.append(f"{flag(name)} {shlex.quote(str(value))}")
    return " ".join([*words, f"--init {shlex.quote(str(root))}"])


def pretrain(preset: str, config: PretrainConfig, beginning: Beginning = ORDINARY) -> int:
    """Start or resume the pre-training of ``config``; return the exit status."""
    if run(Pretrainer, preset, config, beginning) is not None:
        root = Pretrainer.root(preset, config)
        print(f"  samples: {root / 'samples'}")
        print(f"  train: {train_command(preset, config, root)}")
    return 0
