"""The metrics of generated images against a reference, their floors, and their summary over seeds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from diffratio_fast.data.sampler import permutation
from diffratio_fast.metrics.features import Extractor
from diffratio_fast.metrics.frechet import Moments, frechet_distance, moments
from diffratio_fast.metrics.kernel import kernel_distance
from diffratio_fast.metrics.neighbors import DENSITY_K, neighbor_metrics
from diffratio_fast.metrics.reference import Measured, Reference, kept_numbers
from diffratio_fast.metrics.scores import SPLITS, classifier_score

PUBLISHED_NAMES = {
    "fid": ("frechet", "inception"),
    "kid": ("kernel", "inception"),
    "is": ("score", "inception"),
    "fdd": ("frechet", "dinov2"),
}
"""Published names of a metric: the metric, and the features it is of."""
SUBSET = 10_000
"""Maximum images per side for kernel and neighbor metrics: a fixed random choice."""
Results = dict[str, float | None]


@dataclass(frozen=True)
class Sample:
    """A set of features: moments of all ``count`` images, vectors (in random or unknown order) and logits."""

    count: int
    moments: Moments | None
    features: npt.NDArray[np.float32] | None
    logits: npt.NDArray[np.float32] | None = None


def sample_of(measured: Measured) -> Sample:
    features = measured.set
    return Sample(
        features.count, features.moments if features.count > 1 else None, features.features, features.logits
    )


def subset(sample: Sample, count: int) -> Sample:
    """A random choice of ``count`` features with its moments (None if too few for full rank)."""
    assert sample.features is not None
    chosen = sample.features[kept_numbers(len(sample.features), count)]
    return Sample(len(chosen), moments(chosen) if len(chosen) > chosen.shape[1] else None, chosen)


@dataclass(frozen=True)
class Comparison:
    """Generated images beside reference images in one feature space."""

    sample: Sample
    reference: Sample
    extractor: Extractor
    device: torch.device

    @cached_property
    def vectors(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]] | None:
        """At most ``SUBSET`` feature vectors of each side, a fixed choice; None where a side has none."""
        if self.sample.features is None or self.reference.features is None:
            return None
        own, others = (
            v[kept_numbers(len(v), SUBSET)] for v in (self.sample.features, self.reference.features)
        )
        return own, others


def _frechet(pair: Comparison) -> Results:
    own, others = pair.sample.moments, pair.reference.moments
    known = own is not None and others is not None
    return {pair.extractor.names.frechet: frechet_distance(own, others) if known else None}  # type: ignore[arg-type]


def _kernel(pair: Comparison) -> Results:
    if pair.vectors is None or min(map(len, pair.vectors)) < 2:
        return {}
    value, error = kernel_distance(*pair.vectors, pair.device)
    return {pair.extractor.names.kernel: value, f"{pair.extractor.names.kernel}_error": error}


def _neighbors(pair: Comparison) -> Results:
    if pair.vectors is None or min(map(len, pair.vectors)) <= DENSITY_K:
        return {}
    return neighbor_metrics(*pair.vectors, pair.device)._asdict()


def _score(pair: Comparison) -> Results:
    logits = pair.sample.logits
    if logits is None or len(logits) < SPLITS:
        return {}
    value, deviation = classifier_score(logits[permutation(0, 1, len(logits))])
    return {pair.extractor.names.score: value, f"{pair.extractor.names.score}_deviation": deviation}


METRICS: dict[str, Callable[[Comparison], Results]] = {
    "frechet": _frechet,
    "kernel": _kernel,
    "neighbours": _neighbors,  # words: ok
    "score": _score,
}
"""By the name that ``--metrics`` takes: a function to named results, to none where the data are too few."""


def compute_metrics(
    sample: Sample, reference: Sample, extractor: Extractor, metrics: tuple[str, ...], device: torch.device
) -> Results:
    """Compute the chosen metrics, by their names in this feature space; None if the data are insufficient."""
    pair = Comparison(sample, reference, extractor, device)
    results: Results = {}
    for name, metric in METRICS.items():
        if name in metrics:
            results |= metric(pair)
    return results


def floors(
    generated: Sample,
    reference: Reference,
    extractor: Extractor,
    metrics: tuple[str, ...],
    device: torch.device,
) -> dict[str, Any]:
    """Metrics of real images, with the number of generated images or as many as available.

    ``held_out_name``: the held-out images against the reference. ``halves``: one half of the reference
    against the other. Each comes with the metrics of equally many generated images against the same side.
    """
    metrics = tuple(metric for metric in metrics if metric != "score")
    complete = Sample(reference.count or 0, reference.moments, reference.features)
    pairs: dict[str, tuple[Sample, Sample]] = {}
    if reference.held_out is not None:
        held_out = Sample(len(reference.held_out), None, reference.held_out)
        pairs[reference.held_out_name] = (held_out, complete)
    if reference.features is not None and len(reference.features) >= 4:
        order = permutation(0, 1, len(reference.features))
        half = len(order) // 2
        first, second = (
            Sample(half, None, reference.features[o]) for o in (order[:half], order[half : 2 * half])
        )
        pairs["halves"] = (second, subset(first, half))
    result: dict[str, Any] = {}
    for name, (real, against) in pairs.items():
        count = min(
            real.count, generated.count, len(generated.features if generated.features is not None else ())
        )
        if count < 2:
            continue
        result[name] = {
            "count": count,
            "reference_count": against.count,
            "real": compute_metrics(subset(real, count), against, extractor, metrics, device),
            "generated": compute_metrics(subset(generated, count), against, extractor, metrics, device),
        }
    return result


LARGER_IS_BETTER = (
    "precision",
    "recall",
    "density",
    "coverage",
    "classifier_score",
    "inception_score",
    "class_accuracy",
)


def summary(results: list[Results]) -> dict[str, dict[str, float | None]]:
    """Mean, standard deviation (for more than one seed) and best value of each metric over the seeds."""
    summarized: dict[str, dict[str, float | None]] = {}
    for name in results[0]:
        values = [result[name] for result in results]
        if any(value is None for value in values):
            continue
        numbers = np.array(values, np.float64)
        spread = float(numbers.std(ddof=1)) if len(numbers) > 1 else None
        summarized[name] = {"mean": float(numbers.mean()), "std": spread}
        if not name.endswith(("_error", "_deviation")):
            best = numbers.max() if name in LARGER_IS_BETTER else numbers.min()
            summarized[name]["best"] = float(best)
    return summarized
