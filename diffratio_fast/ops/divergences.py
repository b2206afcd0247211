"""The divergences a generator can descend, as one table.

For D_f(p_data || p_gen) = E_gen[f(rho)] with rho = p_data / p_gen, the gradient that reaches a sample is
-h(l) * grad l, where l = log rho and h = f''(rho) rho^2. Each row states its f; ``h`` is that product
divided by ``constant``, the convention by which definitions of a divergence differ. The order of the table is
the code by which the compiled operations know a divergence (``csrc/common/divergences.h``): append, never
reorder.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """f(rho), h(l) = f''(rho) rho^2 / constant, and the bound on l inside h where h grows with rho."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    constant: float = 1.0
    clamp: float | None = None

    def factor(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """(h of the clamped log ratio, whether it was clamped), both shaped like ``log_ratio``.

        The clamp acts inside h only and nothing here is differentiated.
        """
        log_ratio = log_ratio.detach()
        if self.clamp is None:
            return self.h(log_ratio), torch.zeros_like(log_ratio, dtype=torch.bool)
        return self.h(log_ratio.clamp(-self.clamp, self.clamp)), log_ratio.abs() > self.clamp


def _js(rho: Tensor) -> Tensor:
    return (rho * rho.log() - (1 + rho) * ((1 + rho) / 2).log()) / 2


def _softened(rho: Tensor) -> Tensor:
    return (1 + rho) / 2 * ((1 + rho) / (2 * rho)).log()


DIVERGENCES: dict[str, Divergence] = {
    # KL(p_gen || p_data)
    "reverse_kl": Divergence(lambda r: -r.log(), torch.ones_like),
    # half KL(p_data || m) + half KL(p_gen || m), m the even mixture
    "jensen_shannon": Divergence(_js, torch.sigmoid, constant=0.5),
    # KL(m || p_data): what the non-saturating GAN loss descends
    "softened_reverse_kl": Divergence(_softened, lambda x: torch.sigmoid(-x), constant=0.5),
    # KL(p_data || p_gen)
    "forward_kl": Divergence(lambda r: r * r.log(), torch.exp, clamp=3.0),
    # integral of (sqrt p_data - sqrt p_gen)^2
    "squared_hellinger": Divergence(
        lambda r: (r.sqrt() - 1) ** 2, lambda x: (x / 2).exp(), constant=0.5, clamp=5.0
    ),
    # KL both ways
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda x: 1 + x.exp(), clamp=3.0),
}
