"""Laws of the noise level sigma, by name: ``loguniform(0.1, 1.3)``, ``lognormal(-1.2, 1.2)``, ...

A law is a row of ``LAWS``. Importing this module does not import torch, so that the command line can check a
law; ``objectives.sigma`` draws from one.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffratio_fast.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NoiseLaw:
    """A law of sigma: its spelling, its quantile function (float64 in (0, 1) to float64) and its support."""

    name: str
    quantile: Callable[[Tensor], Tensor]
    low: float
    high: float

    def covers(self, other: NoiseLaw) -> bool:
        """Whether the support of ``other`` lies inside this law's (to rounding)."""
        slack = 1e-9
        return other.low >= self.low * (1 - slack) and other.high <= self.high * (1 + slack)


def loguniform(low: float, high: float) -> NoiseLaw:
    """log sigma uniform between log low and log high."""
    _require(0 < low < high < math.inf, "loguniform(min, max) needs 0 < min < max")
    a, b = math.log(low), math.log(high)
    return NoiseLaw(f"loguniform({low:g}, {high:g})", lambda u: (a + (b - a) * u).exp(), low, high)


def lognormal(mean: float, std: float) -> NoiseLaw:
    """log sigma normal (Karras et al. 2022, training distribution); logit-normal t in flow matching."""
    _require(math.isfinite(mean) and 0 < std < math.inf, "lognormal(mean, std) needs std > 0")

    def quantile(u: Tensor) -> Tensor:
        from torch.special import ndtri

        return (mean + std * ndtri(u)).exp()

    return NoiseLaw(f"lognormal({mean:g}, {std:g})", quantile, 0.0, math.inf)


def karras(
    low: float, high: float, rho: float = 7.0, truncated_low: float = 0.0, truncated_high: float = 1.0
) -> NoiseLaw:
    """sigma^(1/rho) uniform between its ends (Karras et al. 2022, eq. 5), or on a part of that interval.

    ``truncated_low`` and ``truncated_high`` keep that fraction of the way from ``low`` to ``high``.
    """
    _require(0 < low < high < math.inf and rho > 0, "karras(min, max, rho) needs 0 < min < max and rho > 0")
    _require(0 <= truncated_low < truncated_high <= 1, "karras(..., from, to) needs 0 <= from < to <= 1")
    a, b = low ** (1 / rho), high ** (1 / rho)

    def quantile(u: Tensor) -> Tensor:
        return (a + (b - a) * (truncated_low + (truncated_high - truncated_low) * u)) ** rho

    ends = [(a + (b - a) * share) ** rho for share in (truncated_low, truncated_high)]
    extra = "" if (truncated_low, truncated_high) == (0, 1) else f", {truncated_low:g}, {truncated_high:g}"
    return NoiseLaw(f"karras({low:g}, {high:g}, {rho:g}{extra})", quantile, ends[0], ends[1])


def flow_uniform(t_low: float = 0.0, t_high: float = 1.0) -> NoiseLaw:
    """Flow-matching time t uniform, sigma = t / (1 - t): logistic in log sigma; t covers all of (0, 1)."""
    _require(0 <= t_low < t_high <= 1, "flow_uniform(t_min, t_max) needs 0 <= t_min < t_max <= 1")

    def quantile(u: Tensor) -> Tensor:
        t = t_low + (t_high - t_low) * u
        return t / (1 - t)

    high = t_high / (1 - t_high) if t_high < 1 else math.inf
    return NoiseLaw(f"flow_uniform({t_low:g}, {t_high:g})", quantile, t_low / (1 - t_low), high)


def flow_logitnormal(mean: float = 0.0, std: float = 1.0) -> NoiseLaw:
    """Flow-matching time t logit-normal, sigma = t / (1 - t): lognormal with the same mean and std."""
    return lognormal(mean, std)


def fixed(sigma: float) -> NoiseLaw:
    """One noise level."""
    _require(0 < sigma < math.inf, "fixed(sigma) needs sigma > 0")
    return NoiseLaw(f"fixed({sigma:g})", lambda u: u * 0 + sigma, sigma, sigma)


LAWS: dict[str, Callable[..., NoiseLaw]] = {
    law.__name__: law for law in (fixed, loguniform, lognormal, karras, flow_uniform, flow_logitnormal)
}


def parse_noise_law(text: str) -> NoiseLaw:
    """The law spelled ``name(number, ...)``; any other text raises a ``UserError`` listing the laws."""
    match = re.fullmatch(r"\s*(\w+)\s*\(([^()]*)\)\s*", text)
    if not match or match[1] not in LAWS:
        known = ", ".join(
            f"{name}({', '.join(inspect.signature(law).parameters)})" for name, law in LAWS.items()
        )
        raise UserError(f"noise law {text} is not known; the laws are {known}")
    law = LAWS[match[1]]
    try:
        numbers = [float(word) for word in match[2].split(",")] if match[2].strip() else []
        inspect.signature(law).bind(*numbers)
    except (ValueError, TypeError):
        raise UserError(
            f"noise law {text}: {match[1]} takes the numbers ({', '.join(inspect.signature(law).parameters)})"
        ) from None
    return law(*numbers)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(f"noise law: {message}")
