"""Distances and scores against plain implementations of their definitions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from sklearn.metrics.pairwise import polynomial_kernel

from diffratio_fast.metrics import kernel, neighbors
from diffratio_fast.metrics.frechet import Moments, RunningMoments, frechet_distance, moments
from diffratio_fast.metrics.kernel import kernel_distance
from diffratio_fast.metrics.neighbors import neighbor_metrics
from diffratio_fast.metrics.reference import kept_numbers
from diffratio_fast.metrics.results import Sample, floors, subset, summary
from diffratio_fast.metrics.scores import classifier_score


def cloud(seed: int, count: int, dimension: int, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, dimension)) + shift).astype(np.float32)


@pytest.mark.parametrize("block", [7, 1024])
def test_running_moments_are_those_of_all_at_once(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RunningMoments, "BLOCK", block)
    x = cloud(0, 500, 6) * [1e-3, 1, 1, 10, 1, 1] + [
        1e4,
        0,
        -5,
        0,
        3,
        1,
    ]  # a mean far from zero: no cancellation
    running = RunningMoments(6)
    for part in np.split(x, [1, 2, 40, 41, 300]):
        running.add(part)
    found, expected = running.moments(), moments(x)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-12)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-9, atol=1e-12)
    assert running.count == 500


def test_frechet_distance_of_drawn_gaussians_tends_to_the_closed_form() -> None:
    """Correlated Gaussians: the second covariance is four times the first, so 2 (C1 C2)^1/2 is 4 C1."""
    random = np.random.default_rng(0)
    mixing = random.normal(size=(5, 5))
    a = random.normal(size=(400_000, 5)) @ mixing
    b = random.normal(size=(400_000, 5)) @ mixing * 2 + 0.5
    covariance = mixing.T @ mixing
    closed = 5 * 0.25 + np.trace(covariance)
    exact = frechet_distance(Moments(np.zeros(5), covariance), Moments(np.full(5, 0.5), 4 * covariance))
    assert exact == pytest.approx(closed, rel=1e-12)
    assert frechet_distance(moments(a), moments(b)) == pytest.approx(closed, rel=0.01)


def test_torch_fidelity_finds_the_same_on_the_same_features() -> None:
    try:
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision is for another torch version
        pytest.skip(f"torch-fidelity: {error}")
    a, b = (torch.from_numpy(cloud(seed, 700, 40, seed / 9) @ cloud(5, 40, 40)) for seed in (0, 1))
    theirs = fid_statistics_to_metric(*(fid_features_to_statistics(x) for x in (a, b)), verbose=False)
    ours = frechet_distance(moments(a.numpy()), moments(b.numpy()))
    assert ours == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    options = {"kid_subsets": 1, "kid_subset_size": 700, "verbose": False}
    theirs = kid_features_to_metric(a.double(), b.double(), **options)
    assert kernel_distance(a, b).value == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = isc_features_to_metric(a, splits=10, shuffle=False)
    assert classifier_score(a).value == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert classifier_score(a).deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)


@pytest.mark.parametrize("block", [16, 1024])
def test_kernel_distance_is_its_definition(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "BLOCK", block)
    a, b = cloud(0, 50, 8).astype(np.float64), cloud(1, 37, 8, 0.3).astype(np.float64)
    found = kernel_distance(a, b)
    aa, bb, ab = (
        polynomial_kernel(x, y, degree=3, gamma=1 / 8, coef0=1) for x, y in ((a, a), (b, b), (a, b))
    )
    expected = (aa.sum() - np.trace(aa)) / (50 * 49) + (bb.sum() - np.trace(bb)) / (37 * 36) - 2 * ab.mean()
    assert found.value == pytest.approx(expected, rel=1e-10)
    assert (found.error is None) == (block == 1024)


def test_kernel_distance_of_equal_laws_is_zero_within_its_error() -> None:
    same = kernel_distance(cloud(0, 4096, 4), cloud(1, 4096, 4))
    assert same.error is not None and abs(same.value) < 4 * same.error
    other = kernel_distance(cloud(0, 4096, 4), cloud(1, 4096, 4, 0.3))
    assert other.error is not None and other.value > 10 * other.error


@pytest.mark.parametrize("block", [9, 1024])
def test_neighbor_metrics_are_their_definitions(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "BLOCK", block)
    fake, real = cloud(0, 40, 3, 0.4), cloud(1, 60, 3)

    def radius(x: np.ndarray, k: int) -> np.ndarray:
        return np.sort(cdist(x, x), axis=1)[:, k]  # the nearest is the point itself

    distance = cdist(fake, real)
    narrow, wide, own = radius(real, 3), radius(real, 5), radius(fake, 3)
    found = neighbor_metrics(fake, real)
    assert found.precision == pytest.approx((distance <= narrow).any(1).mean())
    assert found.recall == pytest.approx((distance <= own[:, None]).any(0).mean())
    assert found.density == pytest.approx((distance <= wide).sum() / (5 * 40))
    assert found.coverage == pytest.approx((distance.min(0) <= wide).mean())
    assert 0 < found.recall < 1 and 0 < found.precision < 1  # the case is not trivial


def test_neighbor_metrics_of_extremes() -> None:
    x = cloud(0, 300, 4)
    same = neighbor_metrics(x, x)
    assert same.precision == same.recall == same.coverage == 1
    far = neighbor_metrics(x + 100, x)
    assert far == (0, 0, 0, 0)
    copies = neighbor_metrics(np.repeat(x[:1], 300, 0), x)  # one image repeated: faithful, not diverse
    assert copies.precision == 1 and copies.recall < 0.02 and copies.coverage < 0.05
    with pytest.raises(ValueError, match="more than 5"):
        neighbor_metrics(x[:5], x)


def test_classifier_score_of_extremes() -> None:
    certain = np.tile(np.eye(8) * 50, (20, 1))
    assert classifier_score(certain).value == pytest.approx(8, rel=1e-6)
    assert classifier_score(np.zeros((40, 8))).value == pytest.approx(1)
    with pytest.raises(ValueError, match="at least 10"):
        classifier_score(np.zeros((9, 8)))


def test_subsets_are_the_same_whenever_they_are_drawn() -> None:
    chosen = kept_numbers(1000, 100)
    assert np.array_equal(chosen, kept_numbers(1000, 100)) and len(set(chosen.tolist())) == 100
    assert (np.diff(chosen) > 0).all() and chosen.min() < 100 and chosen.max() > 900
    assert np.array_equal(kept_numbers(7, 100), np.arange(7))


class Plain:
    """The part of an extractor that the metrics need."""

    from diffratio_fast.metrics.features.base import Names

    names = Names()


def test_floors_are_at_the_number_of_generated_images() -> None:
    from diffratio_fast.metrics.reference import Reference

    train, test, generated = cloud(0, 4000, 4), cloud(1, 500, 4), cloud(2, 900, 4, 0.2)
    sample = Sample(len(generated), moments(generated), generated)
    reference = Reference({}, moments(train), 4000, train, held_out=test, held_out_name="test")
    found = floors(sample, reference, Plain(), ("frechet",), torch.device("cpu"))  # type: ignore[arg-type]
    assert found["test"]["count"] == 500 and found["halves"]["count"] == 900
    assert found["test"]["reference_count"] == 4000 and found["halves"]["reference_count"] == 2000
    for floor in found.values():
        assert floor["real"]["frechet_distance"] < 0.05 < floor["generated"]["frechet_distance"]
    few = subset(sample, 4)
    assert few.moments is None and few.count == 4  # of four features in four dimensions: no full rank


def test_summary_over_seeds() -> None:
    found = summary([{"fid": 2.0, "precision": 0.5, "x": None}, {"fid": 4.0, "precision": 0.7, "x": 1.0}])
    assert found["fid"] == {"mean": 3.0, "std": pytest.approx(2**0.5), "best": 2.0}
    assert found["precision"]["best"] == 0.7 and "x" not in found
