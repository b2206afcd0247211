"""Base class of runs: start or resume, steps, reports, checkpoints, clean interruption."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from diffratio_fast import launch, report
from diffratio_fast.config.run import RunConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.devices import choose_device, peak_memory
from diffratio_fast.errors import Interrupted, ReportedElsewhere, UserError
from diffratio_fast.progress import Progress
from diffratio_fast.report.diagnosis import warnings
from diffratio_fast.runs.derived import Derived
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.runs.log import MetricsLog
from diffratio_fast.runs.loggers import Levels, Loggers, parse_loggers
from diffratio_fast.runs.paths import default_root
from diffratio_fast.storage.checkpoints import Retention
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.training.beginning import ORDINARY, Beginning
from diffratio_fast.training.processes.parallel import gather
from diffratio_fast.training.processes.pulse import Pulse
from diffratio_fast.training.processes.world import ALONE, Agreement, World, common_store, joined, lost_others
from diffratio_fast.training.starting import Start
from diffratio_fast.training.state.checkpoint import Checkpoints
from diffratio_fast.training.state.run_state import RunState
from diffratio_fast.training.state.watch import BadSteps
from diffratio_fast.training.step.capture import check_capture, stepping
from diffratio_fast.training.step.stepper import Batch, Stepper

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@contextlib.contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """Context: a list of the received ``STOP_SIGNALS``.

    A second signal has its usual effect, except under a launcher: there the same signal often arrives twice,
    from the launcher and from its sender.
    """
    received: list[int] = []
    previous: dict[int, Any] = {}

    def note(number: int, frame: object) -> None:
        received.append(number)
        if not launch.launched():
            for known, handler in previous.items():
                signal.signal(known, handler)

    for wanted in STOP_SIGNALS:
        previous[wanted] = signal.signal(wanted, note)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Run:
    """One run of any kind: its data, its training, its directory. A subclass defines what it trains.

    Each of several processes has one, and all run the same steps. Only rank 0 measures, prints and writes:
    ``metrics``, ``shown``, ``evaluate``, ``snapshot`` and ``results`` are called there only.
    """

    TRAINS_DENOISER: ClassVar[bool] = False
    """Part of the default directory's name."""
    iteration: Stepper
    """The training iteration, with the state of this process."""
    measured: Stepper
    """The iteration to measure and write: ``iteration``, or a copy with complete networks on rank 0 if its
    weights are sharded. ``refresh`` updates the copy."""

    def __init__(
        self,
        preset: str,
        config: RunConfig,
        directory: RunDirectory,
        *,
        world: World = ALONE,
        started: bool = False,
    ) -> None:
        """``started``: a checkpoint will replace the first state."""
        self.preset, self.config, self.directory, self.world = preset, config, directory, world
        policy = Retention(
            config.keep_checkpoints, config.keep_every_images, config.keep_best, config.batch_size
        )
        self.checkpoints = Checkpoints(directory.checkpoint, world, policy)
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.device = choose_device(config.device)
        with world.together():
            check_capture(config, self.device, world.size)
            self.dataset: DataSet = open_dataset(
                config.data,
                loader=config.loader,
                verify=config.verify,
                device=self.device,
                class_conditional=config.class_conditional,
            )
            self.iteration = self.new_iteration(
                config, self.dataset, self.device, init=not started, world=world
            )
        self.sharded = self.state.sharded
        copies = self.sharded and world.main
        self.measured = (
            self.new_iteration(config, self.dataset, self.device, init=False) if copies else self.iteration
        )
        self.step = stepping(config, self.iteration)

    @classmethod
    def new_iteration(
        cls,
        config: Any,
        dataset: DataSet,
        device: torch.device,
        *,
        init: bool = True,
        planned: bool = False,
        world: World = ALONE,
    ) -> Stepper:
        """Create the training iteration with an initial state; see ``state.generator.initial_state``."""
        raise NotImplementedError

    @classmethod
    def root(cls, preset: str, config: RunConfig) -> Path:
        """The run's directory: ``--run-dir``, or the preset's default."""
        return Path(config.run_dir or default_root(preset, denoiser=cls.TRAINS_DENOISER))

    @property
    def state(self) -> RunState:
        return self.iteration.state

    def refresh(self) -> None:
        """Update ``measured`` to the current state; a collective operation."""
        if not self.sharded:
            return
        state, target = self.state, self.measured.state if self.world.main else None
        for name in state.networks():
            gather(getattr(state, name), None if target is None else getattr(target, name))
        if target is not None:
            target.step = state.step
            for name in state.TENSORS:
                getattr(target, name).copy_(getattr(state, name))

    def advance(self, batches: list[Batch]) -> None:
        """Run one step on ``config.batches_per_step`` batches."""
        self.step.run(batches)

    def noise_levels(self) -> Levels:
        """The noise levels that a log line's lists are over."""
        return {}

    def evaluation_seconds(self) -> float:
        """Seconds that an evaluation takes, by a part of it; 0 where it takes next to nothing."""
        return 0.0

    def figures(self) -> dict[str, Any]:
        """Fields of a line of metrics.jsonl, except step, images, time and memory."""
        raise NotImplementedError

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        """Metrics of a line for the progress bar, by short name."""
        raise NotImplementedError

    def evaluate(self) -> None:
        """Measure the state on the validation split, and write a sample grid."""
        raise NotImplementedError

    def snapshot(self) -> None:
        """Write the average under ``snapshots/``."""
        raise NotImplementedError

    def results(self) -> dict[str, Any]:
        """Write the networks of the run; return the final metrics for summary.json."""
        raise NotImplementedError

    def description(self) -> dict[str, Any] | None:
        """Metadata of the averaged network (``networks.saved``); None if a checkpoint does not need it."""
        return None

    def batches(self) -> Iterator[list[Batch]]:
        """This process's slices of the batches of each step, from the state's step on."""
        count = self.config.batches_per_step
        source = self.dataset.batches(
            "train",
            self.config.batch_size,
            seed=self.config.seed,
            start=self.state.step * count,
            rank=self.world.rank,
            world_size=self.world.size,
        )
        if self.world.size > 1:
            self.iteration.settle(self.dataset.first("train", self.config.batch_size // self.world.size))
        while True:
            yield [next(source) for _ in range(count)]

    def train(self) -> int:
        """Train to ``config.steps``; return the number of the signal that interrupted it, or 0."""
        config, state, world = self.config, self.state, self.world
        self.progress = Progress(config.steps, state.step, config.batch_size, quiet=not world.main)
        if world.main:
            self.derived = Derived(self.progress.print)
            self.log = MetricsLog(self.directory.metrics, state.step, self.progress.print)
            self.loggers = Loggers(
                parse_loggers(config.logger), self.directory.root, state.step,
                config=dataclasses.asdict(config), levels=self.noise_levels(), say=self.progress.print,
            )  # fmt: skip
        for check in self.iteration.checks.values():
            check.warn = self.progress.print
        self.clock = time.monotonic()
        self.logged = (state.step, state.seconds)
        agreed = Agreement(world)
        pulse = self.pulse = Pulse(
            self.progress.print, limit=config.hang_timeout, rank=world.rank, size=world.size,
            store=common_store(world),
        )  # fmt: skip
        stop = 0  # the signal that all processes have agreed on
        self.waited = 0.0  # seconds for batches since the last log line
        self.warned: set[str] = set()
        self.saved_at = time.monotonic()
        self.checkpoints.network = self.description()
        try:
            with _stop_requests() as received, pulse.beating(), self._naming_the_lost():
                batches = self.batches()
                while state.step < config.steps and not stop:
                    last = state.step + 1 == config.steps
                    batch = self._next(batches)
                    pulse.phase("step")
                    self.advance(batch)
                    self.progress.advance()
                    stop, failed, due = agreed(
                        [max(received, default=0), self.checkpoints.failed, self._save_is_due()]
                    )
                    pulse.phase("report", free=True)  # evaluations and writing have no time limit
                    if failed:
                        self._report_failed_save()
                    if last or state.step % config.log_every == 0:
                        self._log()
                    if last or state.step % config.eval_every == 0:
                        self._check_finite()
                        self.refresh()
                        due = world.on_main(self._evaluate) or due
                    if state.step % config.snapshot_every == 0:
                        self._check_finite()
                        self.refresh()
                        world.on_main(self._snapshot)
                    if last or stop or due or state.step % config.checkpoint_every == 0:
                        self._check_finite()
                        self._tick()
                        self._report_failed_save()
                        self.checkpoints.save(state)
                        self.saved_at = time.monotonic()
                    if last or stop:
                        self._report_failed_save(stopping=not last)
                agreed.close()
                return stop if state.step < config.steps else 0
        finally:
            self.checkpoints.close(patience=30.0)
            if world.main:
                self.log.close()
                self.loggers.close()
            self.progress.close()

    def _save_is_due(self) -> bool:
        """Whether a checkpoint is due by rank 0's clock; all processes follow one step later."""
        minutes = self.config.checkpoint_minutes
        return self.world.main and minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes

    def _evaluate(self) -> bool:
        """Evaluate and write the report; return whether this state is the best and needs a checkpoint."""
        self.evaluate()
        self._warn()
        self._report()
        return self.config.keep_best and self.state.best.get("step") == self.state.step

    def _report(self, summary: dict[str, Any] | None = None) -> None:
        self.derived.attempt("report.html", lambda: report.write(self.directory.root, summary))

    def _snapshot(self) -> None:
        self.derived.attempt(f"the snapshot of step {self.state.step}", self.snapshot)

    @contextlib.contextmanager
    def _naming_the_lost(self) -> Iterator[None]:
        """Context: the error about a broken connection names the process that has died."""
        try:
            yield
        except RuntimeError as error:
            missing = self.pulse.missing() if self.world.size > 1 and lost_others(error) else None
            if missing is None:
                raise
            raise UserError(f"{missing}; ending") from error

    def _next(self, batches: Iterator[list[Batch]]) -> list[Batch]:
        self.pulse.phase("data")
        began = time.monotonic()
        batch = next(batches)
        self.waited += time.monotonic() - began
        return batch

    def _warn(self) -> None:
        """Print each warning when its condition begins; the report shows the active ones."""
        found = dict(warnings(self.log.lines, after=self.config.settled_step))
        for kind in found.keys() - self.warned:
            self.progress.print(f"warning: {found[kind]}")
        self.warned = set(found)

    def _report_failed_save(self, *, stopping: bool = False) -> None:
        """Wait for the save in progress; report a failure: as an error by option, or when stopping."""
        message = self.checkpoints.failure()
        if message is None:
            return
        good = self.checkpoints.good
        kept = f"{self.directory.checkpoint / good[-1]} is kept" if good else "there is no earlier one"
        line = f"the checkpoint of step {self.checkpoints.step} could not be saved ({message}); {kept}"
        if stopping or self.config.on_save_failure == "stop":
            raise self._failure(line)
        self.progress.print(f"warning: {line}")

    def _tick(self) -> None:
        now = time.monotonic()
        self.state.seconds += now - self.clock
        self.clock = now

    def _check_finite(self) -> None:
        for check in self.iteration.checks.values():
            if message := check.message():
                good = self.checkpoints.good
                kept = self.directory.checkpoint / good[-1] if good else "no checkpoint"
                raise self._failure(
                    f"training diverged: {message}; lower the learning rates, or skip such updates with "
                    f"--on-nonfinite skip ({kept} has the last good state)"
                )

    def _failure(self, message: str) -> UserError:
        """The error for a condition that all processes detect: rank 0 reports it."""
        return UserError(message) if self.world.main else ReportedElsewhere(message)

    def _log(self) -> None:
        state = self.state
        self._check_finite()
        step_before, seconds_before = self.logged
        steps = state.step - step_before
        if any(check.skipped >= max(steps, 10) for check in self.iteration.checks.values()):
            raise self._failure(
                f"training diverged: no update since step {step_before} was finite; lower the learning rates"
            )
        self._tick()
        bad = self.iteration.watch.take()
        self.refresh()
        if self.world.main:
            self._write_line(steps, max(state.seconds - seconds_before, 1e-9), bad)
        state.sums.zero_()
        for check in self.iteration.checks.values():
            check.skipped = 0
        self.logged, self.waited = (state.step, state.seconds), 0.0
        limit = self.config.stop_after_bad_steps
        if limit is not None and bad.longest >= limit:
            raise self._failure(
                f"training stopped: {bad.longest} steps in a row up to about step {state.step} were bad (a "
                "loss or gradient norm was not finite, or far above its mean); lower the learning rates, "
                f"or resume from {self.directory.checkpoint} with a larger --stop-after-bad-steps"
            )

    def _write_line(self, steps: int, seconds: float, bad: BadSteps) -> None:
        state, config = self.state, self.config
        values = {
            "step": state.step,
            "images": state.step * config.batch_size,
            "seconds": state.seconds,
            "images_per_second": steps * config.batch_size / seconds,
            "loader_share": min(self.waited / seconds, 1.0),
            **self.figures(),
            "bad_steps": bad.number,
            "skipped_updates": sum(check.skipped for check in self.iteration.checks.values()),
            "memory_bytes": peak_memory(self.device),
        }
        self.record(values)
        self.progress.metrics(values, self.shown(values))
        self._warn()

    def record(self, values: dict[str, Any]) -> None:
        """Write a line of metrics.jsonl, and its numbers to TensorBoard."""
        self.log.write(values)
        self.loggers.line(values)

    def picture(self, image: bytes) -> None:
        """Write the PNG of a sample grid of this step."""
        directory = self.directory
        path = directory.sample_grid(self.state.step)
        self.derived.attempt("a sample grid", lambda: replace_file(path, image, root=directory.root))
        self.loggers.picture("samples", image, self.state.step)

    def finish(self) -> dict[str, Any]:
        """Write the final files: networks, report and summary.json, which marks the run as finished."""
        self.clock = time.monotonic()
        figures = self.results()
        self._tick()
        state, config = self.state, self.config
        summary = {
            "preset": self.preset,
            "steps": state.step,
            "images": state.step * config.batch_size,
            **figures,
            "images_per_second": state.step * config.batch_size / state.seconds,
            "seconds": state.seconds,
        }
        self._report(summary)
        replace_file(self.directory.summary, json.dumps(summary, indent=2) + "\n")
        return summary


def run(
    kind: type[Run], preset: str, config: RunConfig, beginning: Beginning = ORDINARY
) -> dict[str, Any] | None:
    """Start or resume a run in its directory; return its summary if this process finished it.

    Raises ``Interrupted`` if a signal stopped it after a save, except under a launcher: a launcher treats
    every status except 0 as a failure.
    """
    device = choose_device(config.device)
    if launch.restarts():  # after a restart the launcher passes the same options
        beginning = replace(beginning, fresh=False)
    with joined(device) as world:
        directory = RunDirectory(kind.root(preset, config))
        try:
            start = Start(directory, config, beginning, world)
            config = start.config
            one = kind(preset, config, directory, world=world, started=start.continues)
            start.load(one)
            if one.state.step >= config.steps and start.finished:
                if world.main:
                    print(
                        f"{directory.root}: finished at step {one.state.step}; nothing to do "
                        "(use a larger --steps to extend it, --fresh to start again)"
                    )
                return None
            world.on_main(lambda: start.open(one))
            stopped = one.train()
            if not stopped:
                one.refresh()
                summary = world.on_main(one.finish)
        finally:
            directory.close()
        if stopped:
            if world.main:
                name = signal.Signals(stopped).name
                print(f"{name}: saved at step {one.state.step}; the same command resumes", flush=True)
            if not launch.launched() and stopped in (signal.SIGINT, signal.SIGTERM):
                raise Interrupted(stopped)
            return None
        if not world.main:
            return None
    print(f"finished: {summary['steps']} steps in {summary['seconds']:.0f} s")
    return summary
