"""The objectives a generator can be trained by: what makes a step of each, and what measures it."""

from __future__ import annotations

from diffratio_fast.training.monitor import Evaluation
from diffratio_fast.training.monitor_vsd import VSDEvaluation
from diffratio_fast.training.step.generator import Iteration
from diffratio_fast.training.step.vsd import VSDIteration

METHODS: dict[str, tuple[type[Iteration], type[Evaluation]]] = {
    "diffratio": (Iteration, Evaluation),
    "vsd": (VSDIteration, VSDEvaluation),
}
