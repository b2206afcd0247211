"""Images small enough to train on with one CPU core, and what measures generated ones."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.data.dataset import DataSet, InMemoryDataSet
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.metrics.frechet import frechet_distance, moments
from diffratio_fast.metrics.neighbors import neighbor_metrics
from diffratio_fast.metrics.quality import Quality
from diffratio_fast.metrics.spaces import PixelSpace

CLASSIFIER_RATE = 2e-3
CLASSIFIER_BATCH = 128
FEATURES = 64


def averaged(dataset: DataSet, records: dict[str, int], factor: int = 2) -> InMemoryDataSet:
    """The first ``records`` of each split, averaged over ``factor`` x ``factor`` pixels."""
    splits = {}
    for split, count in records.items():
        images, labels = dataset.first(split, count)
        small = F.avg_pool2d(images.float(), factor).round().to(torch.uint8) if factor > 1 else images
        splits[split] = small, labels
    channels = splits["train"][0].double().movedim(1, 0).flatten(1)
    side = splits["train"][0].shape[-1]
    scaling = Scaling(
        tuple(channels.mean(1).tolist()), tuple(channels.std(1, correction=0).tolist()),
        dataset.scaling.low, dataset.scaling.high,
    )  # fmt: skip
    return InMemoryDataSet(f"{dataset.name}, {side} x {side}", dataset.class_names, scaling, splits)


class Classifier(nn.Module):
    """A small convolutional classifier of images [N, C, R, R]; its last hidden layer gives the features."""

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        channels, side, _ = shape
        self.convolutions = nn.ModuleList()
        for width in (16, 32, 64):
            stride = 1 if width == 16 and side <= 16 else 2
            self.convolutions.append(nn.Conv2d(channels, width, 3, stride=stride, padding=1))
            channels, side = width, -(-side // stride)
        self.hidden = nn.Linear(channels * side * side, FEATURES)
        self.last = nn.Linear(FEATURES, classes)

    def features(self, x: Tensor) -> Tensor:
        """float32 [N, FEATURES]."""
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        return F.relu(self.hidden(x.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.features(x))


def fitted_classifier(dataset: InMemoryDataSet, epochs: int, seed: int = 0) -> Classifier:
    """A classifier trained on the training split, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Classifier(dataset.shape, len(dataset.class_names))
        optimizer = torch.optim.Adam(network.parameters(), CLASSIFIER_RATE)
        count = dataset.count("train")
        batch = min(CLASSIFIER_BATCH, count)
        steps = epochs * (count // batch)
        batches = dataset.batches("train", batch, seed=seed)
        for step in range(steps):
            records, labels = next(batches)
            optimizer.param_groups[0]["lr"] = CLASSIFIER_RATE * (1 - step / steps)
            loss = F.cross_entropy(network(dataset.scaling.to_model(records.float())), labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return network.eval().requires_grad_(False)


class Judge:
    """Distances of generated images to the test split, on pixels and on a classifier's features."""

    def __init__(self, dataset: InMemoryDataSet, classifier: Classifier, samples: int) -> None:
        self.dataset, self.classifier = dataset, classifier
        self.pixels = Quality(dataset, PixelSpace(dataset))
        self.labels = self.pixels.labels("test", samples)
        test = dataset.scaling.to_model(dataset.splits["test"][0].float())
        features = classifier.features(test).numpy()
        self.moments, self.neighbors = moments(features), features[:samples]

    def __call__(self, images: Tensor) -> dict[str, float]:
        """Metrics of images [N, C, R, R] of the classes ``labels``."""
        low, high = self.dataset.scaling.bounds() or ([-torch.inf], [torch.inf])
        images = images.float().clamp(_column(low), _column(high))
        features = self.classifier.features(images)
        neighbors = neighbor_metrics(features.numpy(), self.neighbors)
        named = self.classifier.last(features).argmax(1)
        return {
            "pixels": self.pixels.distance(images, "test"),
            "features": frechet_distance(moments(features.numpy()), self.moments),
            "accuracy": float((named == self.labels).float().mean()),
            "precision": neighbors.precision,
            "recall": neighbors.recall,
            "coverage": neighbors.coverage,
        }

    def real(self) -> dict[str, float]:
        """The metrics of as many training images of the same classes: the floor."""
        records, labels = self.dataset.splits["train"]
        images = torch.empty(len(self.labels), *records.shape[1:])
        for label in self.labels.unique():
            places = (self.labels == label).nonzero().squeeze(1)
            found = records[labels == label]
            images[places] = self.dataset.scaling.to_model(
                found[torch.arange(len(places)) % len(found)].float()
            ).float()
        return self(images)


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values).reshape(-1, 1, 1)


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and standard error."""
    if len(values) < 2:
        return statistics.mean(values), 0.0
    return statistics.mean(values), statistics.stdev(values) / len(values) ** 0.5
