"""The training loop: continue or begin, step, measure, save, stop cleanly."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffratio_fast import networks, report
from diffratio_fast.command import UserError
from diffratio_fast.config import TrainConfig
from diffratio_fast.data import DataSet, open_dataset
from diffratio_fast.devices import choose_device
from diffratio_fast.files import make_directory, replace_file
from diffratio_fast.networks import SavedNetwork
from diffratio_fast.objectives.refit import Refitted
from diffratio_fast.report.diagnosis import warnings
from diffratio_fast.training.evaluation import Evaluation
from diffratio_fast.training.iteration import Batch, Iteration
from diffratio_fast.training.reporting import Events, MetricsLog, Progress, peak_memory
from diffratio_fast.training.run_directory import RunDirectory
from diffratio_fast.training.state import (
    SUMS,
    initial_state,
    load_checkpoint,
    network_arguments,
    save_checkpoint,
)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[str]]:
    """A list that SIGINT and SIGTERM add their names to; a second one acts at once, as usual."""
    received: list[str] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(signal.Signals(number).name)
        for known, handler in previous.items():
            signal.signal(known, handler)

    for wanted in (signal.SIGINT, signal.SIGTERM):
        previous[wanted] = signal.signal(wanted, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Trainer:
    """One run: its data, its state, its directory."""

    def __init__(self, preset: str, config: TrainConfig, directory: RunDirectory) -> None:
        self.preset, self.config, self.directory = preset, config, directory
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = choose_device(config.device)
        self.dataset: DataSet = open_dataset(
            config.data, kind="image", loader=config.loader, verify=config.verify, device=self.device
        )
        self.state = initial_state(config, self.dataset, self.device)
        self.iteration = Iteration(config, self.dataset.scaling, self.state, self.device)
        self.refitted: Refitted | None = None  # the newest evaluation's copy of the ratio network
        self.evaluation = Evaluation(config, self.dataset, self.iteration)

    def batches(self) -> Iterator[list[Batch]]:
        """Batches of each step from the state's on: ``ratio_steps`` of them at a time."""
        count = self.config.ratio_steps
        source = self.dataset.batches(
            "train", self.config.batch_size, seed=self.config.seed, start=self.state.step * count
        )
        while True:
            yield [next(source) for _ in range(count)]

    def train(self) -> str | None:
        """Run to ``config.steps``; the name of the signal that stopped it earlier, or None."""
        config, state = self.config, self.state
        self.log = MetricsLog(self.directory.metrics, state.step)
        self.events = Events(self.directory.root, state.step)
        self.progress = Progress(config.steps, state.step, config.batch_size)
        self.clock = time.monotonic()
        self.logged = (state.step, state.seconds)
        self.warned: set[str] = set()
        try:
            with _stop_requests() as stop:
                batches = self.batches()
                while state.step < config.steps and not stop:
                    last = state.step + 1 == config.steps
                    logs = last or (state.step + 1) % config.log_every == 0
                    self.iteration.run(next(batches), measure=logs)
                    self.progress.advance()
                    if logs:
                        self._log()
                    if last or state.step % config.eval_every == 0:
                        self._evaluate()
                    if state.step % config.snapshot_every == 0:
                        self._save_generator(f"generator-{state.step:08d}")
                    if last or stop or state.step % config.checkpoint_every == 0:
                        self._checkpoint()
                return stop[0] if stop and state.step < config.steps else None
        finally:
            self.log.close()
            self.events.close()
            self.progress.close()

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.clock = now

    def _checkpoint(self) -> None:
        self._check_finite(float(self.state.sums[0]))
        self._tick()
        save_checkpoint(self.directory.checkpoint, self.state)

    def _check_finite(self, loss: float) -> None:
        if not math.isfinite(loss):
            kept = self.directory.checkpoint
            raise UserError(
                f"training diverged before step {self.state.step}: the ratio loss is {loss}; lower the "
                f"learning rates ({kept if kept.exists() else 'no checkpoint'} holds the last good state)"
            )

    def _log(self) -> None:
        state, config = self.state, self.config
        sums = dict(zip(SUMS, state.sums.tolist(), strict=True))
        self._check_finite(sums["ratio_loss"])
        steps = sums.pop("steps")
        mean = {name: value / steps for name, value in sums.items()}
        self._tick()
        step_before, seconds_before = self.logged
        validation, train = self.evaluation.bound("validation"), self.evaluation.bound("train")
        values = {
            "step": state.step,
            "images": state.step * config.batch_size,
            "seconds": state.seconds,
            "images_per_second": (state.step - step_before)
            * config.batch_size
            / max(state.seconds - seconds_before, 1e-9),
            "ratio_loss": mean["ratio_loss"],
            "ratio_accuracy": (mean["correct_real"] + mean["correct_fake"]) / 2,
            "log_ratio_real": mean["log_ratio_real"],
            "log_ratio_fake": mean["log_ratio_fake"],
            "divergence": validation.value,
            "divergence_train": train.value,
            "divergence_by_sigma": validation.by_level,
            "divergence_train_by_sigma": train.by_level,
            "clamped_fraction": mean["clamped"],
            "gradient_norm": float(self.iteration.gradient_norm),
            "generator_lr": state.generator_optimizer.param_groups[0]["lr"],
            "ratio_lr": state.ratio_optimizer.param_groups[0]["lr"],
            "memory_bytes": peak_memory(self.device),
        }
        state.sums.zero_()
        self._record(values)
        self.progress.metrics(values)
        self.logged = (state.step, state.seconds)

    def _record(self, values: dict[str, Any]) -> None:
        self.log.write(values)
        self.events.scalars(values)

    def _evaluate(self) -> None:
        state = self.state
        began = time.monotonic()
        make_directory(self.directory.samples)
        picture = self.evaluation.grid_png()
        replace_file(self.directory.samples / f"step-{state.step:08d}.png", picture)
        self.events.picture("samples", picture, state.step)
        fields, self.refitted = self.evaluation.loss_by_sigma()
        distance = self.evaluation.validation_distance()
        if distance is not None:
            fields["frechet_distance_validation"] = distance
        self._record({"step": state.step, **fields, "evaluation_seconds": time.monotonic() - began})
        said = [] if distance is None else [f"Fréchet distance to the validation split {distance:.3f}"]
        if "divergence_refit" in fields:
            said.append(f"divergence after a refit {fields['divergence_refit']:.3f} nats")
        if said:
            self.progress.say(f"step {state.step:>6}: {', '.join(said)}")
        self._warn()
        if distance is not None and (not state.best or distance < state.best["frechet_distance_validation"]):
            state.best = {"step": state.step, "frechet_distance_validation": distance}
            self._save_generator("best")
        report.write(self.directory.root)

    def _warn(self) -> None:
        """Say what the figures warn of, each thing when it begins; the report repeats what holds."""
        config = self.config
        after = config.ratio_warmup_steps + config.generator_ramp_steps
        found = dict(warnings(self.log.lines, after=after))
        for kind in found.keys() - self.warned:
            self.progress.say(f"warning: {found[kind]}")
        self.warned = set(found)

    def _save_generator(self, name: str) -> None:
        self._save_network(self.directory.snapshots / f"{name}.safetensors", "generator", self.state.average)

    def _save_network(self, path: Path, role: str, network: nn.Module) -> None:
        config = self.config
        scaling = self.dataset.scaling
        about = SavedNetwork(
            role=role,
            architecture=config.generator if role == "generator" else config.ratio_network,
            arguments=network_arguments(config, self.dataset)[role],
            data={
                "name": self.dataset.name,
                "class_names": list(self.dataset.class_names),
                "scaling": vars(scaling),
            },
            training={"step": self.state.step, "images": self.state.step * config.batch_size},
        )
        networks.save(path, network, about)

    def _measure(self, refitted: Refitted | None) -> None:
        """What only the report shows: calibration, noise laws and the samples' nearest training images."""
        measurements = {
            "noise_levels": self.evaluation.noise_histograms(),
            "calibration": self.evaluation.calibrations(refitted),
        }
        replace_file(self.directory.measurements, json.dumps(measurements, indent=1) + "\n")
        picture = self.evaluation.neighbours_png()
        if picture is not None:
            replace_file(self.directory.neighbours, picture)

    def finish(self) -> dict[str, Any]:
        """The run's last files: networks and summary.json (which marks the run as finished)."""
        self.clock = time.monotonic()
        state, config, directory = self.state, self.config, self.directory
        self._save_network(directory.generator, "generator", state.average)
        self._save_network(directory.ratio, "ratio", state.ratio)
        if state.ratio_average is not None:
            self._save_network(directory.ratio_average, "ratio", state.ratio_average)
        figures = self.evaluation.summary()
        refitted = self.refitted or self.evaluation.refitted(config.refit_steps)
        self._measure(refitted)
        self._tick()
        summary = {
            "preset": self.preset,
            "steps": state.step,
            "images": state.step * config.batch_size,
            **figures,
            "best": state.best,
            "divergence": self.evaluation.bound("validation", every_level=True).value,
            "divergence_refit": None if refitted is None else refitted.bound,
            "images_per_second": state.step * config.batch_size / state.seconds,
            "seconds": state.seconds,
        }
        replace_file(self.directory.summary, json.dumps(summary, indent=2) + "\n")
        report.write(self.directory.root)
        return summary


def train(preset: str, config: TrainConfig, *, fresh: bool = False) -> int:
    """Run or continue the training that ``config`` describes; the process's exit status."""
    directory = RunDirectory(Path(config.run_dir or f"runs/{preset}"))
    started = directory.checkpoint.exists() and not fresh
    if not (started or fresh) and (directory.generator.exists() or directory.finished()):
        raise UserError(
            f"{directory.root}: holds a run's results but no checkpoint; use --fresh to start over"
        )
    if started:
        directory.check_same(config)
    trainer = Trainer(preset, config, directory)
    if started:
        load_checkpoint(directory.checkpoint, trainer.state)
        if trainer.state.step >= config.steps and directory.finished():
            _say_finished(directory, trainer.state.step)
            return 0
    directory.open()
    try:
        if fresh:
            directory.clear()
        directory.summary.unlink(missing_ok=True)
        directory.write_config(preset, config, trainer.device)
        step = trainer.state.step
        print(f"{directory.root}: {f'continuing at step {step}' if step else 'starting'}", flush=True)
        stopped = trainer.train()
        if stopped:
            print(f"{stopped}: saved at step {trainer.state.step}; the same command continues", flush=True)
            return 0
        summary = trainer.finish()
    finally:
        directory.close()
    _say_summary(directory, summary)
    return 0


def _say_finished(directory: RunDirectory, step: int) -> None:
    print(
        f"{directory.root}: finished at step {step}; nothing to do "
        "(a larger --steps continues it, --fresh starts over)"
    )


def _say_summary(directory: RunDirectory, summary: dict[str, Any]) -> None:
    print(f"finished: {summary['steps']} steps in {summary['seconds']:.0f} s")
    if "frechet_distance" in summary:
        print(
            f"  Fréchet distance to the test split {summary['frechet_distance']:.3f} "
            f"(real training data: {summary['frechet_distance_floor']:.3f})\n"
            f"  class accuracy {summary['class_accuracy']:.1%} "
            f"(real test data: {summary['class_accuracy_test']:.1%})"
        )
    print(f"  look: {directory.report}\n  sample: python -m diffratio_fast.sample {directory.root}")
