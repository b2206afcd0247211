"""Pixel metrics of small images: distances, memorization, class accuracy.

Pixels are in [-1, 1] over the range of the records (``to_pixels``), independent of the scaling of the
networks, so that metrics of different runs are comparable.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast.data.dataset import SPLITS, DataSet
from diffratio_fast.metrics.frechet import Moments, frechet_distance, moments

MAX_DIMENSION = 1024
"""Maximum numbers per image; the pixel covariance of larger images is expensive and not meaningful."""
MAX_RECORDS = 10_000
"""Maximum records of a split for the references."""
CLASSIFIER_RECORDS = 2_000
"""Maximum records for fitting the classifier; its cost is quadratic."""


def to_pixels(dataset: DataSet, x0: Tensor) -> npt.NDArray[np.float64]:
    """Convert x0 [N, C, H, W] to float64 [N, C*H*W] in [-1, 1], clipped to the record range, not rounded."""
    low, high = dataset.scaling.low, dataset.scaling.high
    if low is None or high is None:
        raise ValueError(f"{dataset.name} has no pixel range")
    records = dataset.scaling.to_records(x0.double().cpu()).clamp(low, high)
    return (2 * (records - low) / (high - low) - 1).flatten(1).numpy()


def proportional_labels(labels: Tensor, count: int, classes: int) -> Tensor:
    """Labels int64 [count], sorted, with the class frequencies of ``labels`` (largest remainders)."""
    frequency = torch.bincount(labels, minlength=classes).double() / len(labels) * count
    numbers = frequency.floor().long()
    remainder = frequency - numbers
    for label in remainder.argsort(descending=True, stable=True)[: count - int(numbers.sum())]:
        numbers[label] += 1
    place = torch.cat([(torch.arange(int(n)) + 0.5) / max(int(n), 1) for n in numbers])
    return torch.repeat_interleave(torch.arange(classes), numbers)[place.argsort(stable=True)]


def nearest_distance(
    samples: npt.NDArray[np.float64], references: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Euclidean distance of each sample [N, D] to its nearest reference [M, D]: float64 [N]."""
    references_t = torch.from_numpy(references)
    blocks = torch.from_numpy(samples).split(1024)
    return torch.cat([torch.cdist(block, references_t).amin(1) for block in blocks]).numpy()


@dataclass
class PixelMetrics:
    """Metrics of generated images against the splits of a data set; references are computed on demand."""

    dataset: DataSet

    @staticmethod
    def suits(dataset: DataSet) -> bool:
        return dataset.scaling.low is not None and int(np.prod(dataset.shape)) <= MAX_DIMENSION

    def __post_init__(self) -> None:
        self._splits: dict[str, tuple[npt.NDArray[np.float64], Tensor]] = {}

    def split(self, name: str) -> tuple[npt.NDArray[np.float64], Tensor]:
        """Pixels float64 [N, D] and labels int64 [N] of a split's first ``MAX_RECORDS``."""
        if name not in self._splits:
            records, labels = self.dataset.first(name, MAX_RECORDS)
            x0 = self.dataset.scaling.to_model(records.double())
            self._splits[name] = to_pixels(self.dataset, x0), labels
        return self._splits[name]

    @property
    def train(self) -> tuple[npt.NDArray[np.float64], Tensor]:
        return self.split("train")

    @cached_property
    def moments(self) -> dict[str, Moments]:
        return {name: moments(self.split(name)[0]) for name in SPLITS}

    @cached_property
    def classifier(self) -> object:
        """A support-vector machine fitted on the training split (pixels; RBF kernel, C = 10)."""
        from sklearn.svm import SVC

        pixels, labels = self.train
        # gamma="scale" sets the kernel width from the variance of the data
        return SVC(C=10.0, gamma="scale").fit(
            pixels[:CLASSIFIER_RECORDS], labels[:CLASSIFIER_RECORDS].numpy()
        )

    def labels(self, split: str, count: int) -> Tensor:
        """Labels for generating images to compare with ``split``, with its class frequencies."""
        return proportional_labels(self.split(split)[1], count, len(self.dataset.class_names))

    def distance(self, x0: Tensor, split: str) -> float:
        """Fréchet distance of generated x0 to a split."""
        return frechet_distance(moments(to_pixels(self.dataset, x0)), self.moments[split])

    def summary(self, x0: Tensor, labels: Tensor) -> dict[str, float]:
        """The metrics of a finished run: generated x0 and their labels against the test split.

        The metrics of real images use the same number of images, if available.
        """
        samples = to_pixels(self.dataset, x0)
        generated = moments(samples)
        test, test_labels = self.split("test")
        test, test_labels = test[: len(samples)], test_labels[: len(samples)]
        train = self.train[0]
        reference = self.moments["test"]
        floor = moments(train[: len(samples)]) if len(samples) < len(train) else self.moments["train"]
        figures: dict[str, float] = {}
        if len(self.dataset.class_names) > 1:
            predict = self.classifier.predict  # type: ignore[attr-defined]
            figures["class_accuracy"] = float((predict(samples) == labels.cpu().numpy()).mean())
            figures["class_accuracy_test"] = float((predict(test) == test_labels.numpy()).mean())
        return {
            "frechet_distance": frechet_distance(generated, reference),
            "frechet_distance_train": frechet_distance(generated, self.moments["train"]),
            "frechet_distance_floor": frechet_distance(floor, reference),
            "variance_ratio": float(np.trace(generated.covariance) / np.trace(reference.covariance)),
            "nearest_train_distance": float(nearest_distance(samples, train).mean()),
            "nearest_train_distance_test": float(nearest_distance(test, train).mean()),
            **figures,
            "evaluation_images": len(samples),
        }
