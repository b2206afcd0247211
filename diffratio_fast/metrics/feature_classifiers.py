"""Small classifiers of feature vectors, to count generated images that are of their class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional as F

CLASSIFIER_RECORDS = 2_000
"""Records that a support-vector machine is fitted on, at most: its cost grows with their square."""
PENALTY = 1e-3
"""Weight of the squared norm of the weights, beside the mean cross-entropy."""
ITERATIONS = 100

Features = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]


class FeatureClassifier(Protocol):
    def predict(self, features: Features) -> Labels:
        """Classes int64 [N] of features [N, D]."""
        ...


def support_vectors(features: Features, labels: Labels) -> FeatureClassifier:
    """A support-vector machine (RBF kernel, C = 10) of the first ``CLASSIFIER_RECORDS`` rows."""
    from sklearn.svm import SVC

    # "scale" sets the kernel's width from the data's variance: no number of one data set here
    machine = SVC(C=10.0, gamma="scale")
    return machine.fit(features[:CLASSIFIER_RECORDS], labels[:CLASSIFIER_RECORDS])


@dataclass(frozen=True)
class LogisticRegression:
    """Multinomial logistic regression of standardized features: plain arrays, so that it can be kept.

    ``mean`` and ``scale`` float64 [D] standardize; ``weight`` [D, K] and ``bias`` [K] give the logits.
    """

    mean: npt.NDArray[np.float64]
    scale: npt.NDArray[np.float64]
    weight: npt.NDArray[np.float64]
    bias: npt.NDArray[np.float64]

    @classmethod
    def fit(cls, features: Features, labels: Labels, classes: int) -> LogisticRegression:
        """Fit features [N, D] with labels int64 [N] by L-BFGS; deterministic."""
        mean = features.mean(0, dtype=np.float64)
        scale = np.maximum(features.std(0, dtype=np.float64), 1e-8)
        x = torch.from_numpy((features - mean) / scale)
        y = torch.from_numpy(labels)
        weight = torch.zeros(x.shape[1], classes, dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
        search = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

        def loss() -> torch.Tensor:
            search.zero_grad()
            value = F.cross_entropy(x @ weight + bias, y) + PENALTY * weight.square().sum()
            value.backward()
            return value

        search.step(loss)
        return cls(mean, scale, weight.detach().numpy(), bias.detach().numpy())

    def predict(self, features: Features) -> Labels:
        return (((features - self.mean) / self.scale) @ self.weight + self.bias).argmax(1)

    def arrays(self) -> dict[str, npt.NDArray[np.float64]]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
