"""Detection of the first tensor that is NaN or infinite, by name and step, and skipping of updates."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from diffratio_fast.training.processes.world import ALONE, World, is_sharded, local


class FiniteCheck:
    """Checks the loss and gradients of one network before each update.

    With ``skip`` an update with a tensor that is not finite is skipped and reported immediately; the host
    synchronizes once per update. Without ``skip`` there is no synchronization: the device stores the first
    such step, and ``message`` reports it with the next log line.
    """

    def __init__(self, role: str, network: nn.Module, *, skip: bool, world: World = ALONE) -> None:
        self.role, self.network, self.skip, self.world = role, network, skip, world
        self._counted: Tensor | None = None
        self.warn: Callable[[str], None] = print
        self.skipped = 0  # updates since the last reset
        self.gradient_norm = torch.zeros(())
        self.latest: list[Tensor] = []
        """Scalars of the last update, followed by the gradient norm."""
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
        """Norms of the gradients; for sharded gradients, over all parts."""
        if norms is None:
            norms = torch.stack(torch._foreach_norm([local(gradient) for gradient in gradients]))
        sharded = [is_sharded(gradient) for gradient in gradients]
        if not any(sharded):
            return norms
        if self._counted is None or len(self._counted) != len(norms):  # unsharded gradients count once
            self._counted = torch.tensor(sharded, device=norms.device) | self.world.main
        squares = torch.where(self._counted, norms.double().square(), 0.0)
        return self.world.sum(squares).sqrt().to(norms.dtype)

    def message(self) -> str | None:
        """The first step with a tensor that was not finite, and the tensor; None if all were finite."""
        step = -1 if self.step is None else int(self.step)
        return None if step < 0 else self._describe(step, self.bad)

    def _describe(self, step: int, bad: Tensor) -> str:
        names = [name for name, wrong in zip(self.names, bad.tolist(), strict=True) if wrong]
        more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
        return f"step {step + 1}: {names[0]}{more} is NaN or infinite"
