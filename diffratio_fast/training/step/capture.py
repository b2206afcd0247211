"""A training step as CUDA graphs: captured once, then replayed without Python.

Inputs that change from step to step are in fixed memory: seed and step, learning rates, weights of the
averages, batches. ``Stepper.begin`` writes the scalars, ``Captured`` copies the batches, and
``Stepper.compute`` is captured. The first steps run eagerly on the same memory, because libraries choose
algorithms and workspaces then.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError
from diffratio_fast.training.step.stepper import Batch, Stepper

WARMUP = 3
"""Eager steps of each variant before its capture."""


class Step(Protocol):
    """Advances the state of a run by one step."""

    def run(self, batches: list[Batch]) -> None: ...


class Recorder(Protocol):
    """Runs functions eagerly, and records functions that replay their device work."""

    def ordinary(self, function: Callable[[], None]) -> None: ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]: ...


class CudaGraphs:
    """CUDA graphs of one device; eager runs use the stream of the capture."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)

    def ordinary(self, function: Callable[[], None]) -> None:
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            function()
        current.wait_stream(self.stream)

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.stream.device)
        torch.cuda.empty_cache()  # a graph has its own memory
        # threads of the loader allocate and copy during the capture
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Captured:
    """Runs the steps of ``stepper``, with one graph per variant as soon as it is captured."""

    def __init__(self, stepper: Stepper, recorder: Recorder) -> None:
        self.stepper, self.recorder = stepper, recorder
        self._batches: list[Batch] = []
        self._seen: dict[Hashable, int] = {}
        self._replays: dict[Hashable, Callable[[], None]] = {}

    def run(self, batches: list[Batch]) -> None:
        self._take(batches)
        variant = self.stepper.begin()
        if variant in self._replays:
            self._replays[variant]()
        else:
            self.recorder.ordinary(lambda: self.stepper.compute(self._batches, variant))
            self._seen[variant] = self._seen.get(variant, 0) + 1
            if self._seen[variant] == WARMUP:
                self._replays[variant] = self.recorder.record(
                    lambda: self.stepper.compute(self._batches, variant)
                )
        self.stepper.state.step += 1

    def _take(self, batches: list[Batch]) -> None:
        """Copy the batches to the input memory of the graphs."""
        device = self.stepper.device
        if not self._batches:
            self._batches = [
                (records.to(device, copy=True), labels.to(device, copy=True)) for records, labels in batches
            ]
            return
        for place, batch in zip(self._batches, batches, strict=True):
            for target, source in zip(place, batch, strict=True):
                target.copy_(source, non_blocking=True)


def check_capture(config: RunConfig, device: torch.device, processes: int = 1) -> None:
    """Raise ``UserError`` if a step cannot be captured."""
    if not config.capture:
        return
    if device.type != "cuda":
        raise UserError(f"--capture: CUDA graphs need a GPU, and the device is {device.type}; omit --capture")
    if processes > 1 and config.parallel == "fsdp":
        raise UserError(
            "--capture: FSDP gathers weights in Python, which a CUDA graph does not replay; use --parallel "
            "ddp, or "
            "omit --capture"
        )
    if config.on_nonfinite == "skip":
        raise UserError(
            "--capture: --on-nonfinite skip synchronizes with the device in each step; use only one of them"
        )
    if config.optimizer == "apex":
        raise UserError(
            "--capture: the optimizer does not support CUDA graphs; use --optimizer adamw or adam"
        )


def stepping(config: RunConfig, stepper: Stepper) -> Step:
    """The step function of a run: CUDA graphs with ``config.capture``, otherwise ``stepper``."""
    return Captured(stepper, CudaGraphs(stepper.device)) if config.capture else stepper
