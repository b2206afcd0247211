"""The divergences that a generator can minimize, as one table.

For D_f(p_data || p_gen) = E_gen[f(rho)] with rho = p_data / p_gen, the gradient that reaches a sample is
-h(l) * grad l, where l = log rho and h = f''(rho) rho^2. Each row gives its f; ``h`` is that product divided
by ``constant``, because definitions of a divergence differ by a factor. The compiled operations identify a
divergence by its position in the table (``csrc/common/divergences.h``): append, never reorder. The
command line reads the names from here, so the module imports no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Divergence:
    """f(rho), h(l) = f''(rho) rho^2 / constant, and a bound on l inside h if h grows with rho."""

    f: Callable[[Tensor], Tensor]
    h: Callable[[Tensor], Tensor]
    constant: float = 1.0
    clamp: float | None = None

    def factor(self, log_ratio: Tensor) -> tuple[Tensor, Tensor]:
        """Return h of the clamped log ratio and whether it was clamped, both shaped like ``log_ratio``.

        The clamp acts inside h only. The results are not differentiable.
        """
        log_ratio = log_ratio.detach()
        if self.clamp is None:
            return self.h(log_ratio), log_ratio.new_zeros(log_ratio.shape).bool()
        return self.h(log_ratio.clamp(-self.clamp, self.clamp)), log_ratio.abs() > self.clamp


def _js(rho: Tensor) -> Tensor:
    return (rho * rho.log() - (1 + rho) * ((1 + rho) / 2).log()) / 2


def _softened(rho: Tensor) -> Tensor:
    return (1 + rho) / 2 * ((1 + rho) / (2 * rho)).log()


DIVERGENCES: dict[str, Divergence] = {
    # KL(p_gen || p_data)
    "reverse_kl": Divergence(lambda r: -r.log(), lambda x: x.new_ones(x.shape)),
    # KL(p_data || m) / 2 + KL(p_gen || m) / 2, with m = (p_data + p_gen) / 2
    "jensen_shannon": Divergence(_js, lambda x: x.sigmoid(), constant=0.5),
    # KL(m || p_data): minimized by the non-saturating GAN loss
    "softened_reverse_kl": Divergence(_softened, lambda x: (-x).sigmoid(), constant=0.5),
    # KL(p_data || p_gen)
    "forward_kl": Divergence(lambda r: r * r.log(), lambda x: x.exp(), clamp=3.0),
    # integral of (sqrt p_data - sqrt p_gen)^2
    "squared_hellinger": Divergence(
        lambda r: (r.sqrt() - 1) ** 2, lambda x: (x / 2).exp(), constant=0.5, clamp=5.0
    ),
    # KL(p_data || p_gen) + KL(p_gen || p_data)
    "jeffreys": Divergence(lambda r: (r - 1) * r.log(), lambda x: 1 + x.exp(), clamp=3.0),
}
