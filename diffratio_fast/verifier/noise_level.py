"""Choice of the verifier's noise level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from diffratio_fast.config.noise_laws import NoiseLaw
from diffratio_fast.verifier.calibration import Calibration
from diffratio_fast.verifier.selection import LOWEST_SHARE

LARGEST_LOG_MEAN = 0.1
"""|log E_gen e^l| up to which a noise level counts as calibrated."""


@dataclass(frozen=True)
class SigmaCheck:
    """A noise level against the rule of ``choose_sigma``; ``distances`` are over seeds."""

    calibration: Calibration
    distances: tuple[float, ...]
    plain: tuple[float, ...]

    @property
    def log_mean(self) -> float:
        return math.log(max(self.calibration.generated_mean.value, 1e-300))

    @property
    def calibrated(self) -> bool:
        return abs(self.log_mean) < LARGEST_LOG_MEAN

    @property
    def effective(self) -> bool:
        return self.calibration.effective_sample_size >= LOWEST_SHARE

    @property
    def no_worse(self) -> bool:
        """Mean distance not above that of one candidate by more than the standard error of the difference."""
        if not self.distances:
            return False
        differences = torch.tensor(self.distances).double() - torch.tensor(self.plain).double()
        error = float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else 0.0
        return float(differences.mean()) <= error

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "sigma": self.calibration.sigma,
            "log_mean": self.log_mean,
            "effective_sample_size": self.calibration.effective_sample_size,
            "distances": list(self.distances),
            "plain": list(self.plain),
            "chosen": self.calibrated and self.effective and self.no_worse,
        }


def candidate_sigmas(law: NoiseLaw, count: int = 10) -> list[float]:
    """Noise levels inside a law at which a verifier may look: even in log sigma over its middle 96%."""
    low, high = law.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64)).log().tolist()
    return torch.linspace(low, high, count, dtype=torch.float64).exp().tolist()


def choose_sigma(
    calibrations: Sequence[Calibration], distances: Callable[[float | None], Sequence[float]]
) -> tuple[float | None, list[SigmaCheck]]:
    """The smallest noise level that a verifier may use, or None, and the levels that were looked at.

    A level passes with |log E_gen e^l| < 0.1, an effective sample size of at least a tenth, and a distance to
    held-out data no worse than without selection. ``distances(sigma)`` gives the distances of several seeds
    after ``resample``; ``distances(None)`` those of the same seeds with one candidate. It is asked in rising
    order, only where the first two conditions hold, and not beyond the first level that passes.
    """
    plain = tuple(distances(None))
    checks = []
    for row in sorted(calibrations, key=lambda c: c.sigma):
        check = SigmaCheck(row, (), plain)
        if check.calibrated and check.effective:
            check = SigmaCheck(row, tuple(distances(row.sigma)), plain)
        checks.append(check)
        if check.calibrated and check.effective and check.no_worse:
            return row.sigma, checks
    return None, checks
