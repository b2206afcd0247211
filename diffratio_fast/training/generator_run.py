"""Training runs of a generator: what they log, measure and write."""

from __future__ import annotations

import time
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffratio_fast import networks
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.networks.saved import SavedNetwork
from diffratio_fast.objectives.refit import Refitted
from diffratio_fast.runs.measurements import keep_measurements
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.training.beginning import ORDINARY, Beginning
from diffratio_fast.training.monitor import Evaluation
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.run import Run, run
from diffratio_fast.training.state.builders import network_arguments
from diffratio_fast.training.state.generator import SUMS, TrainState, initial_state
from diffratio_fast.training.state.posthoc_ema import averages_by_width, stored
from diffratio_fast.training.step.generator import Iteration


class Trainer(Run):
    """One training of a generator."""

    config: TrainConfig
    iteration: Iteration
    measured: Iteration
    refitted: Refitted | None = None
    """The refitted copy of the ratio network of the last evaluation."""

    @classmethod
    def new_iteration(
        cls,
        config: TrainConfig,
        dataset: DataSet,
        device: torch.device,
        *,
        init: bool = True,
        planned: bool = False,
        world: World = ALONE,
    ) -> Iteration:
        state = initial_state(config, dataset, device, init=init, planned=planned, world=world)
        step: type[Iteration] = config.row.load("step")
        return step(config, dataset.scaling, state, device, world)

    @property
    def state(self) -> TrainState:
        return self.iteration.state

    @cached_property
    def evaluation(self) -> Evaluation:
        monitor: type[Evaluation] = self.config.row.load("monitor")
        return monitor(self.config, self.dataset, self.measured)

    def evaluation_seconds(self) -> float:
        return self.evaluation.seconds()

    def noise_levels(self) -> dict[str, list[float]]:
        return self.evaluation.noise_levels()

    def figures(self) -> dict[str, Any]:
        state = self.state
        sums = dict(zip(SUMS, state.sums.tolist(), strict=True))
        steps = sums.pop("steps")
        return {
            **self.evaluation.running({name: value / steps for name, value in sums.items()}),
            "gradient_norm": float(self.iteration.checks["generator"].gradient_norm),
            "generator_lr": float(state.generator_optimizer.param_groups[0]["lr"]),
            "ratio_lr": float(state.ratio_optimizer.param_groups[0]["lr"]),
        }

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        return self.evaluation.shown(values)

    def evaluate(self) -> None:
        state = self.state
        began = time.monotonic()
        self.picture(self.evaluation.grid_png())
        fields, self.refitted = self.evaluation.loss_by_sigma()
        distance, images = self.evaluation.validation_distance(), self.evaluation.images
        if distance is not None:
            measured = {"evaluation_images": images, "evaluation_features": self.evaluation.features}
            fields |= {"frechet_distance_validation": distance, **measured}
        self.record({"step": state.step, **fields, "evaluation_seconds": time.monotonic() - began})
        messages = []
        if distance is not None:
            messages = [
                f"Fréchet distance of {images:,} images to the validation split {distance:.3f} "
                f"({self.evaluation.features})"
            ]
        if "divergence_refit" in fields:
            messages.append(f"divergence after a refit {fields['divergence_refit']:.3f} nats")
        if messages:
            self.progress.print(f"step {state.step:>6}: {', '.join(messages)}")
        best = state.best
        # distances of another number of images, or on other features, do not compare
        if distance is not None and (
            any(best.get(name) != value for name, value in measured.items())
            or distance < best["frechet_distance_validation"]
        ):
            state.best = {"step": state.step, "frechet_distance_validation": distance, **measured}
            average, path = self.measured.state.average, self.directory.best
            self.derived.attempt("the best snapshot", lambda: self._save_network(path, "generator", average))

    def snapshot(self) -> None:
        path = self.directory.snapshot("generator", self.state.step)
        self._save_network(path, "generator", self.measured.state.average)
        self._keep_averages()

    def _keep_averages(self) -> None:
        """Write the averages of ``posthoc_ema`` under ``snapshots/``, once there are any."""
        state = self.state
        updates = state.step - self.config.warmup_and_ramp()[0]
        if updates < 1:
            return
        networks = self.measured.state
        for width, average in averages_by_width(self.config, networks.kept, networks.average).items():
            path, network = self.directory.kept_average(width, state.step), stored(self.config, average)
            self._save_network(path, "generator", network, ema_std=width, ema_updates=updates)

    def _save_network(self, path: Path, role: str, network: nn.Module, **more: float) -> None:
        networks.save(path, network, self._about(role, **more), root=self.directory.root)

    def description(self) -> dict[str, Any]:
        return vars(self._about("generator"))

    def _about(self, role: str, **more: float) -> SavedNetwork:
        config = self.config
        scaling = self.dataset.scaling
        return SavedNetwork(
            role=role,
            architecture=config.generator if role == "generator" else config.ratio_network,
            arguments=network_arguments(config, self.dataset)[role],
            data={
                "name": self.dataset.name,
                "class_names": list(self.dataset.class_names),
                "scaling": vars(scaling),
                "vae": None if (vae := self.dataset.vae) is None else vars(vae),
            },
            training={"step": self.state.step, "images": self.state.step * config.batch_size} | more,
        )

    def _measure(self, refitted: Refitted | None) -> None:
        """Measurements for the report only: calibration, noise laws, nearest training images."""
        found = {
            "noise_levels": self.evaluation.noise_histograms(),
            "calibration": self.evaluation.calibrations(refitted),
            "evaluations": [],  # existing results belong to an earlier generator
        }
        root = self.directory.root
        self.derived.attempt("measurements.json", lambda: keep_measurements(root, **found))
        picture = self.evaluation.neighbors_png()
        if picture is not None:
            self.derived.attempt(
                "neighbours.png", lambda: replace_file(self.directory.neighbors, picture)
            )  # words: ok

    def results(self) -> dict[str, Any]:
        networks, directory = self.measured.state, self.directory
        self._save_network(directory.generator, "generator", networks.average)
        self._keep_averages()
        if self.config.row.has_ratio:
            self._save_network(directory.ratio, "ratio", networks.ratio)
        if networks.ratio_average is not None:
            self._save_network(directory.ratio_average, "ratio", networks.ratio_average)
        figures = self.evaluation.summary()
        refitted = self.refitted or self.evaluation.refitted(self.config.refit_steps)
        self._measure(refitted)
        figures["best"] = self.state.best
        if not self.config.row.has_ratio:
            return figures
        return figures | {
            "divergence": self.evaluation.bound("validation", every_level=True).value,
            "divergence_refit": None if refitted is None else refitted.bound,
        }


def train(preset: str, config: TrainConfig, beginning: Beginning = ORDINARY) -> int:
    """Start or resume the training of ``config``; return the exit status."""
    summary = run(Trainer, preset, config, beginning)
    if summary is not None:
        _print_summary(Trainer.root(preset, config), summary)
    return 0


def _print_summary(root: Path, summary: dict[str, Any]) -> None:
    if "frechet_distance" in summary:
        print(
            f"  Fréchet distance of {summary['evaluation_images']:,} images to the test split "
            f"{summary['frechet_distance']:.3f} (real training data: "
            f"{summary['frechet_distance_floor']:.3f}; features: {summary['evaluation_features']})"
        )
    if "class_accuracy" in summary:
        print(
            f"  class accuracy {summary['class_accuracy']:.1%} "
            f"(real test data: {summary['class_accuracy_test']:.1%})"
        )
    print(f"  report: {root / 'report.html'}\n  sample: python -m diffratio_fast.sample {root}")
