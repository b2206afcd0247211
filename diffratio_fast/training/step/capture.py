"""A training step as CUDA graphs: captured once, then replayed without Python.

What a step reads that changes from step to step lies in memory that stays where it is: seed and step,
learning rates, weights of the averages, the batches. ``Stepper.begin`` writes the numbers, ``Captured``
copies the batches, and ``Stepper.compute`` is what is captured. The first steps run in the ordinary way, on
the same memory, because libraries choose algorithms and workspaces in them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Protocol

import torch

from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError
from diffratio_fast.training.step.stepper import Batch, Stepper

WARMUP = 3
"""Ordinary steps of each kind before it is captured."""


class Step(Protocol):
    """What advances a run's state by one step."""

    def run(self, batches: list[Batch]) -> None: ...


class Recorder(Protocol):
    """Runs functions in the ordinary way, and makes others that repeat what they do on the device."""

    def ordinary(self, function: Callable[[], None]) -> None: ...

    def record(self, function: Callable[[], None]) -> Callable[[], None]: ...


class CudaGraphs:
    """CUDA graphs of one device; ordinary runs share the stream on which graphs are captured."""

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
        torch.cuda.empty_cache()  # a graph has memory of its own
        # loaders' threads allocate and copy meanwhile
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            function()
        return graph.replay


class Captured:
    """Steps of ``stepper``, by graphs as soon as there are any: one for each variant of a step."""

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
        """Copy the batches to where the graphs read them."""
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
    """Refuse ``--capture`` where a step cannot be captured."""
    if not config.capture:
        return
    if device.type != "cuda":
        raise UserError(f"--capture makes CUDA graphs, and the device is {device.type}; leave it out")
    if processes > 1 and config.parallel == "fsdp":
        raise UserError(
            "--capture: FSDP gathers weights by steps of Python, which a CUDA graph does not repeat; use "
            "--parallel ddp, or leave --capture out"
        )
    if config.on_nonfinite == "skip":
        raise UserError("--capture: --on-nonfinite skip must ask the device in each step; use one of the two")
    if config.optimizer == "apex":
        raise UserError("--capture: use --optimizer adamw or adam, whose step a CUDA graph can hold")


def stepping(config: RunConfig, stepper: Stepper) -> Step:
    """What makes a run's steps: graphs where ``config.capture`` asks for them, else ``stepper`` itself."""
    return Captured(stepper, CudaGraphs(stepper.device)) if config.capture else stepper
