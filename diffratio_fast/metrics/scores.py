"""Metrics of a classifier's outputs, such as the Inception Score."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

SPLITS = 10


class Score(NamedTuple):
    """Mean and standard deviation over the splits."""

    value: float
    deviation: float


def classifier_score(logits: npt.ArrayLike) -> Score:
    """exp of the mean divergence KL(p(y|x) || p(y)) in each of ``SPLITS`` parts (Salimans et al. 2016).

    ``logits`` [N, K] with N >= ``SPLITS`` are split in their order, which should be random. With
    the Inception network this is the Inception Score.
    """
    log_p = torch.as_tensor(np.asarray(logits, np.float64)).log_softmax(1).numpy()
    if len(log_p) < SPLITS:
        raise ValueError(f"the score needs at least {SPLITS} images")
    scores = []
    for part in np.array_split(log_p, SPLITS):
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0)))).sum(1).mean()))
    return Score(float(np.mean(scores)), float(np.std(scores)))
