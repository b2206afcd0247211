"""Monitor losses and gradient norms in each step, without synchronization.

Each monitored number has a running mean and variance. A step is bad if one of the numbers is not finite, or
far above its mean. The statistics and counts are part of the training state, so that a resumed run has the
same warnings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

HORIZON = 100
"""Time constant of the running means in steps."""
LEARNING = 20
"""Initial steps of a number; they are bad only if the number is not finite."""
DEVIATIONS = 6.0
"""Standard deviations above the mean for a jump; ``Watched.jump`` must be exceeded too."""


@dataclass(frozen=True)
class Watched:
    """A monitored number: its name, and the relative rise above its mean that makes a step bad."""

    name: str
    jump: float


LOSS_JUMP, NORM_JUMP = 0.5, 9.0


def initial_statistics(count: int, device: torch.device) -> Tensor:
    """Mean, variance and age of each number: float64 [count, 3]."""
    return torch.zeros(count, 3, dtype=torch.float64, device=device)


def initial_bad_steps(device: torch.device) -> Tensor:
    """Bad steps since the last log line, current run of bad steps, longest run since then: float64 [3]."""
    return torch.zeros(3, dtype=torch.float64, device=device)


class Watch:
    """Updates the statistics and the counts of bad steps in the state."""

    def __init__(self, watched: Sequence[Watched], statistics: Tensor, bad: Tensor) -> None:
        self.watched, self.statistics, self.bad = watched, statistics, bad
        self._jumps = torch.tensor([w.jump for w in watched], dtype=torch.float64, device=statistics.device)

    @torch.no_grad()
    def note(self, values: Sequence[Tensor]) -> None:
        """Add the scalars of a step, in the order of ``watched`` (possibly only the first ones)."""
        found = torch.stack([value.detach().double() for value in values])
        mean, variance, age = self.statistics[: len(values)].unbind(1)
        limit = mean + torch.maximum(DEVIATIONS * variance.sqrt(), self._jumps[: len(values)] * mean.abs())
        finite = found.isfinite()
        jumps = (found > limit) & (age >= LEARNING)
        step_is_bad = (jumps | ~finite).any().double()
        # a jump changes the mean slightly and the variance not at all, so that it stays a jump while it lasts
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
        """Bad steps since the last call; synchronizes with the device."""
        number, in_a_row, longest = (int(value) for value in self.bad.tolist())
        self.bad[0].zero_()
        self.bad[2].fill_(in_a_row)
        return BadSteps(number, longest)


class BadSteps(NamedTuple):
    """Number of bad steps in an interval, and the longest run of bad steps (it may begin earlier)."""

    number: int
    longest: int
