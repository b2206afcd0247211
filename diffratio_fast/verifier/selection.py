"""The ratio network as a verifier: choose one of several candidates of one class.

``resample`` is sampling-importance-resampling (Rubin 1988): it draws a candidate with probability
proportional to the mean of e^l over independent noise draws. As the number of candidates grows, the law of
the result tends to q(x) E[p_data,sigma(x_sigma) / q_sigma(x_sigma) | x], where q is the law of the generator;
as sigma decreases, this tends to the law of the data. ``best`` takes the largest mean l over noise that the
candidates share: more precision, less recall.

Both require that e^l is the density ratio of the sampled, averaged generator: see ``calibrate``,
``objectives.refit``, and ``choose_sigma``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.networks.generate import generate
from diffratio_fast.objectives.diffratio import RatioNetwork

SELECTIONS = ("resample", "best")
BATCH = 256
"""Candidates per batch of the ratio network; fixed, so that results do not depend on a batch size."""
LOWEST_SHARE = 0.1
"""Minimum effective sample size over candidates; below it sampling warns and a refit rejects the level."""


@dataclass(frozen=True)
class Verifier:
    """Selects by ``how`` with ``ratio`` at noise level ``sigma`` and ``draws`` noise draws per candidate."""

    ratio: RatioNetwork
    sigma: float
    how: str = "resample"
    draws: int = 16

    def __post_init__(self) -> None:
        if self.how not in SELECTIONS:
            raise ValueError(f"--select {self.how}: unknown; expected one of {', '.join(SELECTIONS)}")
        if not (0 < self.sigma < math.inf and 1 <= self.draws < 2**16):
            raise ValueError("sigma must be positive and finite, draws from 1 to 65535")

    @torch.no_grad()
    def log_weights(self, images: Tensor, labels: Tensor, seed: int, number: Tensor, index: Tensor) -> Tensor:
        """Log weights float32 [B, N] of candidates ``images`` [B, N, C, H, W] for ``labels`` [B].

        ``number`` int64 [B] are the numbers of the samples, ``index`` int64 [B, N] those of the candidates.
        ``resample``: log of the mean of e^l over the draws. ``best``: mean of l.
        """
        outputs, candidates = images.shape[:2]
        count = outputs * candidates
        if self.how == "best":
            index = number[:, None].expand(outputs, candidates)
        rng = ops.make_rng(seed, 0, images.device)
        # full batches only: the rounding of a matrix product depends on its size
        padded = torch.arange(-(-count // BATCH) * BATCH, device=images.device).clamp(max=count - 1)
        rows = []
        for chosen in padded.split(BATCH):
            clean, own = images.flatten(0, 1)[chosen], index.reshape(-1)[chosen]
            sigma = torch.full((BATCH,), self.sigma, dtype=clean.dtype, device=clean.device)
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
        """Choose a candidate int64 [B] for each row of ``log_weights`` [B, N]."""
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
        """Effective sample size of all candidates over their number (Kish 1965), at most 1."""
        return effective_share(self.log_weights)


def effective_share(log_weights: Tensor) -> float:
    """(mean w)^2 / mean w^2 over all candidates of ``log_weights``, any shape."""
    flat = log_weights.double().flatten()
    return float((2 * flat.logsumexp(0) - (2 * flat).logsumexp(0)).exp() / flat.numel())


@torch.no_grad()
def select(
    verifier: Verifier, generator: nn.Module, labels: Tensor, seed: int, candidates: int, start: int = 0
) -> Selection:
    """Select samples ``start`` to ``start + B - 1`` for ``labels`` int64 [B], each among N candidates.

    The candidates of sample i are the generator's samples i N to i N + N - 1 of the same seed. A sample is a
    function of (seed, number, label, N, verifier), independent of B. Memory depends on N only.
    """
    if candidates < 1:
        raise ValueError(f"candidates must be at least 1, not {candidates}")
    device = next(generator.parameters()).device
    group = max(1, BATCH // candidates)  # samples per batch of candidates
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
