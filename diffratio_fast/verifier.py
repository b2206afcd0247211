"""The ratio network as a verifier: of several candidates of one class, the one to keep.

``resample`` is sampling-importance-resampling (Rubin 1988): it draws a candidate with probability
proportional to the mean of e^l over noise draws of its own. As the number of candidates grows, what it draws
tends to q(x) E[p_data,sigma(x_sigma) / q_sigma(x_sigma) | x], q being the generator's law, and that tends to
the data's as sigma falls. ``best`` takes the largest mean l over noise that the candidates share: precision
for recall.

Either is worth something only where e^l is the density ratio for the very generator that is sampled, the
averaged one: hence ``calibrate``, ``objectives.refit``, and ``choose_sigma``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.metrics.calibration import Calibration, calibration
from diffratio_fast.networks import generate
from diffratio_fast.objectives.diffratio import RatioNetwork
from diffratio_fast.objectives.held_out import log_ratios
from diffratio_fast.objectives.noise_laws import NoiseLaw

SELECTIONS = ("resample", "best")
BLOCK = 256
"""Candidates that go through the ratio network at a time: with it, results depend on no other batch size."""
LOWEST_SHARE = 0.1
"""An effective sample size below this share of the candidates is warned about, and refused in a verifier."""
LARGEST_LOG_MEAN = 0.1
"""|log E_gen e^l| up to which a noise level counts as calibrated."""


@dataclass(frozen=True)
class Verifier:
    """Selects by ``how`` with ``ratio`` at noise level ``sigma``, from ``draws`` noise draws a candidate."""

    ratio: RatioNetwork
    sigma: float
    how: str = "resample"
    draws: int = 16

    def __post_init__(self) -> None:
        if self.how not in SELECTIONS:
            raise ValueError(f"selection {self.how!r} is none of {', '.join(SELECTIONS)}")
        if not (0 < self.sigma < math.inf and 1 <= self.draws < 2**16):
            raise ValueError("sigma must be positive and finite, draws from 1 to 65535")

    @torch.no_grad()
    def log_weights(self, images: Tensor, labels: Tensor, seed: int, number: Tensor, index: Tensor) -> Tensor:
        """float32 [B, N] of candidates ``images`` [B, N, C, H, W] for ``labels`` [B].

        ``number`` int64 [B] are the samples' numbers, ``index`` int64 [B, N] the candidates'. ``resample``:
        log of the mean of e^l over the draws; ``best``: the mean of l.
        """
        outputs, candidates = images.shape[:2]
        count = outputs * candidates
        if self.how == "best":
            index = number[:, None].expand(outputs, candidates)
        rng = ops.make_rng(seed, 0, images.device)
        # whole blocks only: a matrix product's rounding depends on its size
        padded = torch.arange(-(-count // BLOCK) * BLOCK, device=images.device).clamp(max=count - 1)
        rows = []
        for chosen in padded.split(BLOCK):
            clean, own = images.flatten(0, 1)[chosen], index.reshape(-1)[chosen]
            sigma = torch.full((BLOCK,), self.sigma, dtype=clean.dtype, device=clean.device)
            classes = labels[chosen // candidates]
            total: Tensor | None = None
            for draw in range(self.draws):
                noised = ops.add_noise(clean, sigma, rng, own, ops.Purpose.VERIFIER_NOISE, draw=draw)
                value = self.ratio(noised, sigma, classes).float()
                if total is None:
                    total = value
                else:
                    total = total + value if self.how == "best" else torch.logaddexp(total, value)
            assert total is not None
            rows.append(total / self.draws if self.how == "best" else total - math.log(self.draws))
        return torch.cat(rows)[:count].reshape(outputs, candidates)

    def choose(self, log_weights: Tensor, seed: int, number: Tensor) -> Tensor:
        """The chosen candidate int64 [B] of each row of ``log_weights`` [B, N]."""
        if self.how == "best":
            return log_weights.argmax(1)
        rng = ops.make_rng(seed, 0, log_weights.device)
        uniform = ops.uniform(rng, number, ops.Purpose.VERIFIER_CHOICE, 1)
        reached = log_weights.double().softmax(1).cumsum(1) < uniform
        return reached.sum(1).clamp(max=log_weights.shape[1] - 1)


@dataclass(frozen=True)
class Selection:
    """Selected ``images`` [B, C, H, W], and the ``log_weights`` [B, N] of the candidates of each."""

    images: Tensor
    log_weights: Tensor

    @property
    def effective_share(self) -> float:
        """Effective sample size of all candidates' weights over their number (Kish 1965), at most 1."""
        return effective_share(self.log_weights)


def effective_share(log_weights: Tensor) -> float:
    """(mean w)^2 / mean w^2 over all candidates of ``log_weights``, any shape."""
    flat = log_weights.double().flatten()
    return float((2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)).exp() / flat.numel())


@torch.no_grad()
def select(
    verifier: Verifier, generator: nn.Module, labels: Tensor, seed: int, candidates: int, start: int = 0
) -> Selection:
    """Samples ``start`` to ``start + B - 1`` of a seed for ``labels`` int64 [B], each one of N candidates.

    The candidates of sample i are the generator's samples i N to i N + N - 1 of the same seed. A sample is a
    function of (seed, number, label, N, verifier), however many are asked for. Memory grows with N alone.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, not {candidates}")
    device = next(generator.parameters()).device
    group = max(1, BLOCK // candidates)  # samples whose candidates are made and weighed together
    images, weights = [], []
    for first in range(start // group * group, start + len(labels), group):
        number = torch.arange(first, first + group, device=device)
        inside = (number >= start) & (number < start + len(labels))
        own = torch.zeros(group, dtype=torch.int64, device=device)
        own[inside] = labels.to(device)[number[inside] - start]
        made = generate(generator, own.repeat_interleave(candidates), seed, first * candidates)
        made = made.reshape(group, candidates, *made.shape[1:])
        index = torch.arange(first * candidates, (first + group) * candidates, device=device)
        log_weights = verifier.log_weights(made, own, seed, number, index.reshape(group, candidates))
        chosen = verifier.choose(log_weights, seed, number)
        images.append(made[torch.arange(group, device=device), chosen][inside])
        weights.append(log_weights[inside])
    return Selection(torch.cat(images), torch.cat(weights))


@torch.no_grad()
def calibrate(
    ratio: RatioNetwork,
    generator: nn.Module,
    real: Tensor,
    labels: Tensor,
    sigmas: Sequence[float],
    *,
    seed: int,
    fakes: int = 2048,
    draws: int = 4,
) -> list[Calibration]:
    """Calibration of ``ratio`` for ``generator`` at each of ``sigmas``, from reals x0 [B, C, H, W].

    At least ``fakes`` images are generated, with the reals' labels over and over. The reals should be none
    that the network was fitted to.
    """
    device = real.device
    repeats = max(1, math.ceil(fakes / len(labels)))
    rng = ops.make_rng(seed, 0, device)
    many = labels.repeat(repeats)
    made = generate(generator, many, seed)
    index = torch.arange(len(many), device=device)
    levels = torch.tensor(sigmas, dtype=real.dtype, device=device).repeat_interleave(draws)
    again = real.repeat(repeats, 1, 1, 1)
    halves = log_ratios(ratio, again, made, levels.expand(len(many), -1), many, rng, index)
    fake_half = halves[1].reshape(len(many), len(sigmas), draws).cpu().numpy()
    # the draws of a real lie in all its repeats: one image, however often it was noised
    real_half = halves[0].reshape(repeats, len(labels), len(sigmas), draws).permute(1, 2, 0, 3).flatten(2)
    return [
        calibration(real_half[:, k].cpu().numpy(), fake_half[:, k], sigma) for k, sigma in enumerate(sigmas)
    ]


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
