"""How good a run's images are, by its own data set's splits: distances, memorization, class accuracy."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.scaling import to_model
from diffratio_fast.metrics.feature_cache import FeatureCache
from diffratio_fast.metrics.feature_classifiers import (
    FeatureClassifier,
    LogisticRegression,
    support_vectors,
)
from diffratio_fast.metrics.frechet import Moments, frechet_distance, moments
from diffratio_fast.metrics.pixels import MAX_RECORDS, nearest_distance, proportional_labels
from diffratio_fast.metrics.spaces import PixelSpace, Space, choose_space
from diffratio_fast.progress import ImageProgress

READ = 1024
"""Records read at a time."""
POSTERIOR_SEED = 0
"""Seed of the latents that real moments stand for when they are measured."""


def run_quality(
    config: TrainConfig, dataset: DataSet, device: torch.device, images: int, *, quiet: bool = True
) -> Quality | None:
    """What a run's options ask for, where an evaluation generates ``images``; None for no features.

    Pixels are measured against 10,000 records of a split, at most; other features against ``images``, as a
    network has to see all of them.
    """
    vae = None if config.vae is None else Path(config.vae)
    space = choose_space(config.eval_features, dataset, device, vae)
    if space is None:
        return None
    records = MAX_RECORDS if isinstance(space, PixelSpace) else min(images, MAX_RECORDS)
    return Quality(dataset, space, records, quiet)


@dataclass
class Quality:
    """Measures generated x0 in ``space`` against the first ``records`` of the data set's splits.

    Features of the splits, and the classifier, are computed once, when needed, and kept with the data set.
    """

    dataset: DataSet
    space: Space
    records: int = MAX_RECORDS
    quiet: bool = True
    """Without progress display while the splits are read."""
    _splits: dict[str, tuple[npt.NDArray[Any], Tensor]] = field(default_factory=dict, init=False)
    _moments: dict[str, Moments] = field(default_factory=dict, init=False)

    def split(self, name: str) -> tuple[npt.NDArray[Any], Tensor]:
        """Features [N, D] and labels int64 [N] of a split's first ``records``."""
        if name not in self._splits:
            count = min(self.dataset.count(name), self.records)
            about = {"what": name, "space": self.space.identity, "count": count}
            kept = None if self._exact else self._cache.load(about)
            if kept is not None and len(kept.get("features", ())) == count:
                self._splits[name] = kept["features"], self.dataset.first(name, count)[1]
            else:
                self._splits[name] = self._read(name, count)
                if not self._exact:
                    self._cache.save(about, {"features": self._splits[name][0]})
        return self._splits[name]

    def _read(self, name: str, count: int) -> tuple[npt.NDArray[Any], Tensor]:
        found, labels = [], []
        with ImageProgress(count, f"features of the {name} split", quiet=self.quiet) as progress:
            for start in range(0, count, READ):
                records, part = self.dataset.part(name, start, min(start + READ, count))
                found.append(self.space(self.x0(records, start)))
                labels.append(part)
                progress.update(len(part))
        if not found:
            return np.empty((0, 1)), torch.empty(0, dtype=torch.int64)
        return np.concatenate(found), torch.cat(labels)

    def x0(self, records: Tensor, start: int = 0) -> Tensor:
        """Records [N, ...] as x0; latents are drawn from their moments, always the same."""
        if self.dataset.kind == "image":
            return self.dataset.scaling.to_model(records.double())
        rng = ops.make_rng(POSTERIOR_SEED, 0, records.device)
        index = torch.arange(start, start + len(records), device=records.device)
        return to_model(self.dataset.scaling, records, rng, index)

    @property
    def _exact(self) -> bool:
        """Whether features are small enough to compute each time."""
        return isinstance(self.space, PixelSpace)

    @cached_property
    def _cache(self) -> FeatureCache:
        return FeatureCache(self.dataset)

    @property
    def train(self) -> tuple[npt.NDArray[Any], Tensor]:
        return self.split("train")

    def has(self, split: str) -> bool:
        """Whether a split has the two images that a covariance takes."""
        return self.dataset.count(split) >= 2

    def moments(self, split: str) -> Moments:
        """Mean and covariance of a split's features."""
        if split not in self._moments:
            self._moments[split] = moments(self.split(split)[0])
        return self._moments[split]

    @cached_property
    def classifier(self) -> FeatureClassifier:
        """A small classifier of the features, fitted on the training split once per data set."""
        features, labels = self.train
        if self._exact:
            return support_vectors(features, labels.numpy())
        about = {"what": "classifier", "space": self.space.identity, "count": len(labels)}
        classes = len(self.dataset.class_names)
        kept = self._cache.load(about)
        if kept is not None and kept.keys() == LogisticRegression.__dataclass_fields__.keys():
            return LogisticRegression(**kept)
        fitted = LogisticRegression.fit(features, labels.numpy(), classes)
        self._cache.save(about, fitted.arrays())
        return fitted

    def labels(self, split: str, count: int) -> Tensor:
        """Labels to generate with for a comparison with ``split``: its class frequencies."""
        return proportional_labels(self.split(split)[1], count, len(self.dataset.class_names))

    def distance(self, x0: Tensor, split: str) -> float:
        """Fréchet distance of generated x0 to a split."""
        return frechet_distance(moments(self.space(x0)), self.moments(split))

    def nearest(self, x0: Tensor, count: int) -> Tensor:
        """Numbers int64 [N, count] of the training records nearest to each of generated x0 [N, ...]."""
        train = torch.from_numpy(self.train[0]).double()
        distance = torch.cdist(torch.from_numpy(self.space(x0)).double(), train)
        return distance.topk(min(count, len(train)), largest=False).indices

    def summary(self, x0: Tensor, labels: Tensor) -> dict[str, Any]:
        """The metrics of a finished run: generated x0 with their labels against the test split.

        Real images beside them are as many, where there are as many.
        """
        samples = self.space(x0)
        generated = moments(samples)
        test, test_labels = self.split("test")
        test, test_labels = test[: len(samples)], test_labels[: len(samples)]
        train = self.train[0]
        reference = self.moments("test")
        floor = moments(train[: len(samples)]) if len(samples) < len(train) else self.moments("train")
        accuracy: dict[str, float] = {}
        if len(self.dataset.class_names) > 1:
            predict = self.classifier.predict
            accuracy["class_accuracy"] = float((predict(samples) == labels.cpu().numpy()).mean())
            accuracy["class_accuracy_test"] = float((predict(test) == test_labels.numpy()).mean())
        return {
            "frechet_distance": frechet_distance(generated, reference),
            "frechet_distance_train": frechet_distance(generated, self.moments("train")),
            "frechet_distance_floor": frechet_distance(floor, reference),
            "variance_ratio": float(np.trace(generated.covariance) / np.trace(reference.covariance)),
            "nearest_train_distance": float(nearest_distance(samples, train).mean()),
            "nearest_train_distance_test": float(nearest_distance(test, train).mean()),
            **accuracy,
            "evaluation_images": len(samples),
            "evaluation_features": self.space.name,
        }
