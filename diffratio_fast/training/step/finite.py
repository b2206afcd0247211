"""Finding the first tensor that is NaN or infinite, by name and step, and what then happens to the update."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffratio_fast.training.processes.world import ALONE, World, is_sharded, local


class FiniteCheck:
    """Watches one network's loss and gradients before each update.

    With ``skip`` an update with a tensor that is not finite is left out and said at once, for which the host
    waits for the device once an update. Without it nothing waits: the first such step is remembered on the
    device, and ``message`` tells of it when a log line is due.
    """

    def __init__(self, role: str, network: nn.Module, *, skip: bool, world: World = ALONE) -> None:
        self.role, self.network, self.skip, self.world = role, network, skip, world
        self._counted: Tensor | None = None
        self.warn: Callable[[str], None] = print
        self.skipped = 0  # updates since it was last set to zero
        self.gradient_norm = torch.zeros(())
        self.latest: list[Tensor] = []
        """Scalars of the last update, its gradient's norm after them."""
        self.step: Tensor | None = None
        self.bad: Tensor
        self.names: list[str]

    @torch.no_grad()
    def allows(self, step: Tensor, others: Mapping[str, Tensor], norms: Tensor | None = None) -> bool:
        """Whether the update of ``step`` may be made, given the gradients and scalars ``others`` by name.

        ``step`` is an int64 scalar on the device; ``norms``: of the gradients (of this process's part), where
        they are known. Leaves the norm of the gradient in ``gradient_norm``.
        """
        pairs = [(name, p.grad) for name, p in self.network.named_parameters() if p.grad is not None]
        norms = self._norms([gradient for _, gradient in pairs], norms)
        self.gradient_norm = norms.norm()
        self.latest = [*others.values(), self.gradient_norm]
        values = torch.cat([torch.stack([value.detach().to(norms) for value in others.values()]), norms])
        bad = ~values.isfinite()
        self.names = [*others, *(f"the gradient of {self.role}.{name}" for name, _ in pairs)]
        if self.skip:
            if not bool(bad.any()):
                return True
            self.skipped += 1
            self.warn(f"{self._describe(int(step), bad)}: update skipped")
            return False
        if self.step is None:
            self.step, self.bad = torch.full((), -1, device=bad.device), torch.zeros_like(bad)
        first = (self.step < 0) & bad.any()
        self.bad.copy_(torch.where(first, bad, self.bad))
        self.step.copy_(torch.where(first, step, self.step))
        return True

    def _norms(self, gradients: list[Tensor], norms: Tensor | None) -> Tensor:
        """Norms of the gradients; of sharded ones over all their parts."""
        if norms is None:
            norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
        sharded = [is_sharded(gradient) for gradient in gradients]
        if not any(sharded):
            return norms
        if self._counted is None or len(self._counted) != len(norms):  # what is whole counts once
            self._counted = torch.tensor(sharded, device=norms.device) | self.world.main
        squares = torch.where(self._counted, norms.double().square(), 0.0)
        return self.world.sum(squares).sqrt().to(norms.dtype)

    def message(self) -> str | None:
        """The first step with a tensor that was not finite, and the tensor; None where all were finite."""
        step = -1 if self.step is None else int(self.step)
        return None if step < 0 else self._describe(step, self.bad)

    def _describe(self, step: int, bad: Tensor) -> str:
        names = [name for name, wrong in zip(self.names, bad.tolist(), strict=True) if wrong]
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"step {step + 1}: {names[0]}{more} is NaN or infinite"
