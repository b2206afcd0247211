"""Base class of the training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.config.run import RunConfig
from diffratio_fast.data.scaling import Scaling, to_model
from diffratio_fast.objectives.augmentation import flip
from diffratio_fast.training.processes.world import World
from diffratio_fast.training.state.ema import copy_buffers, update_average
from diffratio_fast.training.state.fused_adam import Averages, FusedAdam
from diffratio_fast.training.state.run_state import RunState, run_dtype
from diffratio_fast.training.state.watch import Watch
from diffratio_fast.training.step.finite import FiniteCheck

Batch = tuple[Tensor, Tensor]


def learning_rate_factor(config: RunConfig, step: int) -> float:
    """The schedule's factor at ``step``: rising to 1, then constant, or falling.

    "inverse_sqrt" is EDM2's 1 / sqrt(max(t / t_ref, 1)) (Karras et al. 2024).
    """
    rise = min(1.0, (step + 1) / (config.lr_warmup_steps + 1))
    if config.lr_schedule == "inverse_sqrt":
        return rise / math.sqrt(max(step / config.lr_decay_steps, 1.0))
    done = min(step / config.steps, 1.0)
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    return (config.lr_final + (1.0 - config.lr_final) * fall[config.lr_schedule]) * rise


class Stepper:
    """Common parts of all training steps: images, precision, gradient accumulation.

    A process divides its slice of a batch into parts of ``micro_batch`` images and accumulates their
    gradients. ``index`` contains the positions of the slice in the global batch: the sample indices of all
    random numbers.
    """

    state: RunState
    checks: Mapping[str, FiniteCheck]
    """One check per trained network."""
    watch: Watch

    def __init__(
        self, config: RunConfig, scaling: Scaling, step: int, device: torch.device, world: World
    ) -> None:
        self.config, self.scaling, self.device, self.world = config, scaling, device, world
        self.dtype = run_dtype(config)
        local = config.batch_size // world.size
        self.index = torch.arange(world.rank * local, (world.rank + 1) * local, device=device)
        size = config.micro_batch or local
        self.parts = [slice(start, start + size) for start in range(0, local, size)]
        self.rng = ops.make_rng(config.seed, step, device)
        self.numbers: dict[str, Any] = {}

    def trained(self) -> dict[str, nn.Module]:
        """The trained networks, by their names in a plan."""
        raise NotImplementedError

    def settle(self, batch: Batch) -> None:
        """Run a backward pass of each network with DDP before the first step, without changing the state.

        DDP rebuilds its buckets after the first pass. If this happened in the first step, the first step
        after a restart would sum over processes in another order than an uninterrupted run.
        """
        raise NotImplementedError

    def begin(self) -> Hashable:
        """Host-side part of the step: write step-dependent scalars; return the variant."""
        raise NotImplementedError

    def compute(self, batches: list[Batch], variant: Hashable) -> None:
        """Device-side part of the step, for the variant that ``begin`` returned.

        Nothing here synchronizes, and no other Python value depends on the step, so that a CUDA graph can
        capture it.
        """
        raise NotImplementedError

    def run(self, batches: list[Batch]) -> None:
        """Advance the state by one step, on the step's batches of (records, labels)."""
        self.compute(batches, self.begin())
        self.state.step += 1

    def set(self, name: str, value: float) -> None:
        """Store a scalar of the step: a Python number, or a tensor that a CUDA graph reads."""
        if not self.config.capture:
            self.numbers[name] = value
            return
        if name not in self.numbers:
            self.numbers[name] = torch.zeros((), dtype=self.dtype, device=self.device)
        self.numbers[name].fill_(value)

    def in_precision(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """``network`` compiled, under autocast and with images in the configured memory format."""
        config = self.config
        compiled = torch.compile(network) if config.compile else network

        def call(images: Tensor, *arguments: Tensor) -> Tensor:
            if config.channels_last and images.dim() == 4:
                images = images.contiguous(memory_format=torch.channels_last)
            if config.precision != "bfloat16":
                return compiled(images, *arguments)
            with torch.autocast(self.device.type, torch.bfloat16):
                output = compiled(images, *arguments)
            return output.float()

        return call

    def update(
        self,
        check: FiniteCheck,
        others: Mapping[str, Tensor],
        optimizer: torch.optim.Optimizer,
        averages: Averages = (),
    ) -> bool:
        """Update the checked network and its averages, unless the check skips that; whether it was done.

        ``others``: scalars by name that must be finite too.
        """
        fused, network = isinstance(optimizer, FusedAdam), check.network
        if (check.skip or not fused) and not check.allows(self.rng[1], others):
            return False
        if isinstance(optimizer, FusedAdam):
            squares = optimizer.update(averages)
            if not check.skip:
                check.allows(self.rng[1], others, squares.sqrt())
            for average, _ in averages:
                copy_buffers(average, network)
        else:
            optimizer.step()
            for average, weight in averages:
                update_average(average, network, weight)
        return True

    def to_device(
        self, batch: Batch, rng: Tensor | None = None, index: Tensor | None = None, *, substep: int = 0
    ) -> Batch:
        """Records and labels as x0 in the run's dtype and labels, on its device.

        Latents are drawn from their moments with (rng, index, substep); without ``rng`` they are fixed.
        """
        records, labels = (tensor.to(self.device, non_blocking=True) for tensor in batch)
        if rng is None or index is None:
            fixed = ops.make_rng(self.config.seed, 0, self.device)
            places = torch.arange(len(labels), device=self.device)
            return to_model(self.scaling, records, fixed, places, draw=1).to(self.dtype), labels
        return to_model(self.scaling, records, rng, index, substep=substep).to(self.dtype), labels

    def part(self, batch: Batch, part: slice, substep: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """(x0, labels, sample indices) of a part of a batch, with the data's random flips."""
        index = self.index[part]
        x0, labels = self.to_device((batch[0][part], batch[1][part]), self.rng, index, substep=substep)
        return flip(x0, self.rng, index, self.config.flip_probability, substep=substep), labels, index

    def share(self, index: Tensor) -> float:
        """Weight of a part's mean in the mean over this process's slice of the batch."""
        return len(index) / len(self.index)

    def is_last(self, part: slice) -> bool:
        return part is self.parts[-1]
