"""The objectives a generator can be trained by: what makes a step of each, and what measures it."""

from __future__ import annotations

from diffratio_fast.training.evaluation import Evaluation
from diffratio_fast.training.iteration import Iteration
from diffratio_fast.training.vsd import VSDEvaluation, VSDIteration

METHODS: dict[str, tuple[type[Iteration], type[Evaluation]]] = {
    "diffratio": (Iteration, Evaluation),
    "vsd": (VSDIteration, VSDEvaluation),
}
