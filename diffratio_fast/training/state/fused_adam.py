"""Adam in one pass over a network's parameters, with all that follows an update of an EDM2 network.

Weights of ``MPConv`` layers are normalized after every update (Karras et al. 2024, Section 2.3), not before
every pass: once an update however many parts a batch has. Where a network is sharded (FSDP2), a process has
whole rows of each weight, so that it normalizes its own.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast.networks.edm2 import Kept, MPConv, force_normalization
from diffratio_fast.ops import parameters as operations
from diffratio_fast.training.processes.world import is_sharded, local

Averages = Sequence[tuple[nn.Module, float | Tensor]]
"""Averages of a network, and what the network counts for in each."""


def supports(network: nn.Module) -> bool:
    """Whether ``FusedAdam`` is for this network: one of EDM2's layers, float32, with compiled operations."""
    layers = any(isinstance(module, MPConv) for module in network.modules())
    return layers and all(operations.compiled_for(local(p)) for p in network.parameters())


class FusedAdam(torch.optim.Optimizer):
    """AdamW (``decoupled``) or Adam of a network; its state has PyTorch's names.

    With ``dtype`` it keeps the normalized weights of the next pass in that type.
    """

    def __init__(
        self, network: nn.Module, settings: dict[str, Any], *, decoupled: bool, dtype: torch.dtype | None
    ) -> None:
        super().__init__(list(network.parameters()), {"eps": 1e-8, **settings})
        self.decoupled = decoupled
        force_normalization(network)
        self._kept: dict[Tensor, Kept] = {}
        for module in network.modules():
            if isinstance(module, MPConv):
                keeps = dtype is not None and not is_sharded(module.weight)
                normalized = torch.empty_like(module.weight, dtype=dtype).detach() if keeps else None
                module.kept = self._kept[module.weight] = Kept(weakref.ref(module.weight), normalized)

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.update()

    @torch.no_grad()
    def update(self, averages: Averages = ()) -> Tensor:
        """Update the parameters that have a gradient, and the averages; the gradients' squared norms."""
        (group,) = self.param_groups
        chosen = [(i, p) for i, p in enumerate(group["params"]) if p.grad is not None]
        weights = [p for _, p in chosen]
        if not weights:
            return torch.zeros(0)
        for p in weights:
            if not self.state[p]:
                self.state[p] = {
                    "step": torch.zeros((), dtype=torch.float32, device=p.device),
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }
        states = [self.state[p] for p in weights]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        kept = [self._kept.get(p) for p in weights]
        squares = operations.adam_step(
            [local(p) for p in weights],
            [local(p.grad) for p in weights],
            [local(state["exp_avg"]) for state in states],
            [local(state["exp_avg_sq"]) for state in states],
            steps,
            rate=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            decay=group["weight_decay"],
            decoupled=self.decoupled,
            averages=[(_of(average, chosen), share) for average, share in averages],
            normalize=[found is not None for found in kept],
            normalized=[None if found is None else found.normalized for found in kept],
        )
        for found in kept:
            if found is not None:
                found.take_note()
        return squares


def _of(average: nn.Module, chosen: list[tuple[int, Tensor]]) -> list[Tensor]:
    """An average's parameters in the place of the network's."""
    parameters = list(average.parameters())
    return [local(parameters[i]) for i, _ in chosen]
