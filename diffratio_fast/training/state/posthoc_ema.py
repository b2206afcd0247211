"""Post-hoc averages: a power-function average of any width, from snapshots of two (Karras et al. 2024).

The average of relative width std at time t gives the weights of time tau the density p(tau) = (gamma + 1)
tau^gamma / t^(gamma + 1) up to t (``ema.power_exponent`` gives gamma). A linear combination of the profiles
of snapshots at several times and widths approximates the requested profile; the same combination of the
snapshots approximates the requested average. With ``ema.power_decay`` the fraction of a step in an average is
exactly the integral of p over that step, with time in updates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from diffratio_fast.config.run import RunConfig
from diffratio_fast.training.state.ema import averaged_copy, power_decay, power_exponent


class Profile(NamedTuple):
    """Relative width of an average, and its number of updates."""

    std: float
    updates: int


def inner_product(a: Profile, b: Profile) -> float:
    """The integral of the product of two profiles, per update: closed form (the paper's Appendix C)."""
    early, late = sorted((a, b), key=lambda profile: profile.updates)
    first, second = power_exponent(early.std), power_exponent(late.std)
    share = (first + 1) * (second + 1) / (first + second + 1)
    return float(share * (early.updates / late.updates) ** second / late.updates)


def combination(snapshots: Sequence[Profile], wanted: Profile) -> tuple[npt.NDArray[np.float64], float]:
    """The weights of the snapshots, and the relative error of the profile |sum_i w_i p_i - p| / |p|.

    Least squares with weights that sum to one, so that constant tensors are unchanged.
    """
    products = np.array([[inner_product(a, b) for b in snapshots] for a in snapshots])
    target = np.array([inner_product(a, wanted) for a in snapshots])
    norm = inner_product(wanted, wanted)
    # Lagrange multiplier for the constraint; scaled to numbers near one; pseudo-inverse, because snapshots of
    # neighboring times are nearly dependent
    count = len(snapshots)
    system = np.ones((count + 1, count + 1))
    system[:count, :count] = products / norm
    system[count, count] = 0
    solution = np.linalg.lstsq(system, np.append(target / norm, 1.0), rcond=1e-13)[0]
    weights = solution[:count]
    squared = weights @ products @ weights - 2 * weights @ target + norm
    return weights, float(np.sqrt(max(squared, 0.0) / norm))


def _others(config: RunConfig) -> list[float]:
    return [width for width in config.posthoc_widths if width != config.ema_std]


def kept_averages(config: RunConfig, network: nn.Module) -> nn.ModuleList | None:
    """An average of ``network`` for each width except the run's own, which already has an average."""
    others = _others(config)
    return nn.ModuleList([averaged_copy(network) for _ in others]) if others else None


def kept_weights(config: RunConfig, update: int) -> dict[str, float]:
    """Weight of the network in each of ``kept_averages`` at an update (from 0), by name."""
    return {f"kept {width}": 1 - power_decay(update, width) for width in _others(config)}


def kept_with_weights(
    config: RunConfig, kept: nn.ModuleList | None, weights: Mapping[str, float | Tensor]
) -> list[tuple[nn.Module, float | Tensor]]:
    """Each of ``kept_averages`` with its weight of ``kept_weights``."""
    widths = _others(config)
    return [(average, weights[f"kept {width}"]) for width, average in zip(widths, kept or [], strict=False)]


def averages_by_width(
    config: RunConfig, kept: nn.ModuleList | None, average: nn.Module
) -> dict[float, nn.Module]:
    """Every average of ``config.posthoc_ema`` by its width; ``average`` is the run's own."""
    found = dict(zip(_others(config), kept or [], strict=True))
    return {width: found.get(width, average) for width in config.posthoc_widths}


def stored(config: RunConfig, average: nn.Module) -> nn.Module:
    """The average in the form of a snapshot."""
    return averaged_copy(average).half() if config.posthoc_ema_half else average
