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
"""Maximum |log E_gen e^l| of a calibrated noise level."""


@dataclass(frozen=True)
class SigmaCheck:
    """The conditions of ``choose_sigma`` at one noise level; ``distances`` are over seeds."""

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
        """Whether the mean distance exceeds that of one candidate by at most the standard error."""
        if not self.distances:
            return False
        differences = torch.tensor(self.distances).double() - torch.tensor(self.plain).double()
        error = float(differences.std() / math.sqrt(len(differences))) if len(differences) > 1 else 0.0
        return float(differences.mean()) <= error

    def as_dict(self) -> dict[str, Any]:
        """JSON data."""
        return {
            "sigma": self.calibration.sigma,
            "log_mean": self.log_mean,
            "effective_sample_size": self.calibration.effective_sample_size,
            "distances": list(self.distances),
            "plain": list(self.plain),
            "chosen": self.calibrated and self.effective and self.no_worse,
        }


def candidate_sigmas(law: NoiseLaw, count: int = 10) -> list[float]:
    """Candidate noise levels of a verifier: uniform in log sigma over the central 96% of a noise law."""
    low, high = law.quantile(torch.tensor([0.02, 0.98], dtype=torch.float64)).log().tolist()
    return torch.linspace(low, high, count, dtype=torch.float64).exp().tolist()


def choose_sigma(
    calibrations: Sequence[Calibration], distances: Callable[[float | None], Sequence[float]]
) -> tuple[float | None, list[SigmaCheck]]:
    """The smallest valid noise level of a verifier, or None, and the levels that were checked.

    A level is valid if |log E_gen e^l| < 0.1, the effective sample size is at least a tenth, and the distance
    to held-out data is no worse than without selection. ``distances(sigma)`` returns the distances of several
    seeds after ``resample``; ``distances(None)`` those of the same seeds with one candidate. It is called in
    increasing order, only if the first two conditions hold, and not after the first valid level.
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
