"""Watching a run's losses and gradients, step by step and without waiting for the device.

Each watched number has a running mean and variance. A step is bad where one of them is not finite, or jumps
far above its mean. What is watched and how many steps were bad is part of the training state, so that a run
that was stopped and continued says and does the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HORIZON = 100
"""Steps over which a mean looks back."""
LEARNING = 20
"""First steps of a number, of which none is bad unless it is not finite."""
DEVIATIONS = 6.0
"""Standard deviations above its mean at which a number jumps, if ``Watched.jump`` says so too."""


@dataclass(frozen=True)
class Watched:
    """A number to watch: its name, and the share of its mean by which it must rise above it to be bad."""

    name: str
    jump: float


LOSS_JUMP, NORM_JUMP = 0.5, 9.0


def initial_statistics(count: int, device: torch.device) -> Tensor:
    """Mean, variance and age of each number: float64 [count, 3]."""
    return torch.zeros(count, 3, dtype=torch.float64, device=device)


def initial_bad_steps(device: torch.device) -> Tensor:
    """Bad steps since the last log line, in a row up to now, most in a row since then: float64 [3]."""
    return torch.zeros(3, dtype=torch.float64, device=device)


class Watch:
    """Notes a step's numbers in the state's statistics and counts of bad steps."""

    def __init__(self, watched: Sequence[Watched], statistics: Tensor, bad: Tensor) -> None:
        self.watched, self.statistics, self.bad = watched, statistics, bad
        self._jumps = torch.tensor([w.jump for w in watched], dtype=torch.float64, device=statistics.device)

    @torch.no_grad()
    def note(self, values: Sequence[Tensor]) -> None:
        """Note a step's scalars, in the order of ``watched``; of fewer, the first so many."""
        found = torch.stack([value.detach().double() for value in values])
        mean, variance, age = self.statistics[: len(values)].unbind(1)
        limit = mean + torch.maximum(DEVIATIONS * variance.sqrt(), self._jumps[: len(values)] * mean.abs())
        finite = found.isfinite()
        jumps = (found > limit) & (age >= LEARNING)
        step_is_bad = (jumps | ~finite).any().double()
        # a jump moves the mean a little and the variance not at all, so that it stays one while it lasts
        rate = torch.where(jumps, 1 / HORIZON, torch.clamp(1 / (age + 1), min=1 / HORIZON))
        step = torch.where(finite, torch.where(jumps, limit, found), mean) - mean
        usual = finite & ~jumps
        variance.copy_(torch.where(usual, (1 - rate) * (variance + rate * step.square()), variance))
        mean.add_(rate * step)
        age.add_(1)
        self.bad[0].add_(step_is_bad)
        self.bad[1].add_(1).mul_(step_is_bad)
        self.bad[2].copy_(torch.maximum(self.bad[2], self.bad[1]))

    def take(self) -> BadSteps:
        """Bad steps since this was last called; waits for the device."""
        number, in_a_row, longest = (int(value) for value in self.bad.tolist())
        self.bad[0].zero_()
        self.bad[2].fill_(in_a_row)
        return BadSteps(number, longest)


class BadSteps(NamedTuple):
    """How many steps of an interval were bad, and the most in a row (which may have begun before it)."""

    number: int
    longest: int
