"""Fit a copy of the ratio network against a frozen generator, with early stopping on held-out data.

The online ratio network follows a changing generator. A copy refitted against a frozen generator is closer to
the log ratio of that generator. Uses: a bound on the divergence that measures the progress of a run, and
calibrated weights for a verifier.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.config.noise_laws import NoiseLaw
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.objectives import diffratio, fused
from diffratio_fast.objectives.diffratio import RatioLoss
from diffratio_fast.objectives.held_out import in_chunks, log_ratios, noise_levels, pair_bounds
from diffratio_fast.objectives.sigma import sample_sigma

HELD_OUT_PAIRS = 2048
"""Minimum number of pairs for a held-out bound; a small validation split gets several fakes and levels."""
LEVELS = 8
UNLEARNING = 3.0
"""Decoupled weight decay that reduces the overconfidence of a network that has overfitted online.

At the end of the digits preset, 200 steps raise its bound from -0.08 to 0.02 nats with it, and not above
-0.03 with a decay of 1. A network that has not overfitted loses a tenth of its bound: 0.20, not 0.22, at
step 500.
"""
FINAL_RATE = 0.05
"""Fraction of the learning rate after the last step."""


@dataclass(frozen=True)
class RefitOptions:
    """Length and learning rate of the fit; it ends after ``patience`` checks without a better bound.

    ``held_out_pairs`` is the minimum per check. ``shared_noise`` applies to the fit and the check.
    """

    steps: int = 2000
    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    check_every: int = 100
    patience: int = 5
    held_out_pairs: int = HELD_OUT_PAIRS
    shared_noise: bool = True


@dataclass(frozen=True)
class Refitted:
    """The best network on held-out data, and (step, bound in nats) of every check; step 0 is the start.

    ``by_level`` is the best network's bound at ``noise_levels(law, LEVELS)``.
    """

    network: nn.Module
    step: int
    checks: list[tuple[int, float]]
    by_level: list[float]

    @property
    def bound(self) -> float:
        """Held-out bound of the best network, nats; slightly optimistic: the same data selects it."""
        return max(bound for _, bound in self.checks)


def refit(
    ratio: nn.Module,
    generator: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    held_out: tuple[Tensor, Tensor],
    law: NoiseLaw,
    *,
    options: RefitOptions,
    seed: int,
) -> Refitted:
    """Fit a copy of ``ratio`` to distinguish ``batches`` from images of the frozen ``generator``.

    ``batches`` and ``held_out`` are (x0 [B, C, H, W], labels int64 [B]) on the networks' device, in their
    dtype. Neither network changes. The result depends only on the arguments.
    """
    network = copy.deepcopy(ratio).requires_grad_(True)
    # with momentum, unlike online: the generator is frozen, so older gradients remain valid
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=options.learning_rate, betas=(0.9, 0.99), weight_decay=options.weight_decay
    )
    fits = isinstance(network, RatioMixer)
    loss: Callable[..., RatioLoss] = fused.ratio_loss if fits else diffratio.ratio_loss
    purposes = ops.SHARED_NOISE if options.shared_noise else ops.SEPARATE_NOISE
    check = _HeldOut(generator, held_out, law, seed, options)
    levels = check.by_level(network)
    checks = [(0, float(levels.mean()))]
    best, best_step, best_levels, since = copy.deepcopy(network.state_dict()), 0, levels, 0
    for step, (real, labels) in enumerate(batches, 1):
        share = (step - 1) / options.steps
        factor = FINAL_RATE + (1 - FINAL_RATE) * (0.5 + 0.5 * math.cos(math.pi * share))
        optimizer.param_groups[0]["lr"] = options.learning_rate * factor
        rng, index = ops.make_rng(seed, step, real.device), torch.arange(len(labels), device=real.device)
        with torch.no_grad():
            fake = generator(latents_for(generator, rng, index, ops.Purpose.LATENT), labels)
        sigma, _ = sample_sigma(law, rng, index, ops.Purpose.SIGMA_RATIO)
        network.train()
        level = sigma[:, 0].to(real.dtype)
        outcome = loss(network, real, fake, level, labels, rng, index, purposes=purposes)
        optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        optimizer.step()
        last = step >= options.steps
        if last or step % options.check_every == 0:
            levels = check.by_level(network)
            bound = float(levels.mean())
            since = 0 if bound > max(value for _, value in checks) else since + 1
            checks.append((step, bound))
            if since == 0:
                best, best_step, best_levels = copy.deepcopy(network.state_dict()), step, levels
            if last or since >= options.patience:
                break
    network.load_state_dict(best)
    return Refitted(network.eval().requires_grad_(False), best_step, checks, best_levels.tolist())


class _HeldOut:
    """The bound on held-out data, with the same fakes, levels and noise every time."""

    @torch.no_grad()
    def __init__(
        self,
        generator: nn.Module,
        held_out: tuple[Tensor, Tensor],
        law: NoiseLaw,
        seed: int,
        options: RefitOptions,
    ) -> None:
        real, labels = held_out
        self.shared_noise = options.shared_noise
        repeats = max(1, math.ceil(options.held_out_pairs / (LEVELS * len(labels))))
        self.real, self.labels = real.repeat(repeats, 1, 1, 1), labels.repeat(repeats)
        self.rng = ops.make_rng(seed, 0, real.device)
        self.index = torch.arange(len(self.labels), device=real.device)
        latents = latents_for(generator, self.rng, self.index, ops.Purpose.SAMPLE_LATENT)
        self.fake = in_chunks(generator, latents, self.labels)
        self.sigma = noise_levels(law, LEVELS).to(real.device, real.dtype).expand(len(self.labels), LEVELS)

    def by_level(self, network: nn.Module) -> Tensor:
        """Bound at each level: [LEVELS]."""
        network.eval()
        halves = log_ratios(
            network, self.real, self.fake, self.sigma, self.labels, self.rng, self.index,
            shared_noise=self.shared_noise,
        )  # fmt: skip
        return pair_bounds(*halves).double().mean(0)
