"""Metrics against closed forms."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.metrics.frechet import Moments, frechet_distance, moments
from diffratio_fast.metrics.pixels import nearest_distance, proportional_labels, to_pixels
from diffratio_fast.metrics.quality import Quality
from diffratio_fast.metrics.spaces import PixelSpace


def on_pixels(dataset: DataSet) -> Quality:
    return Quality(dataset, PixelSpace(dataset))


def test_frechet_distance_of_commuting_gaussians_is_closed_form() -> None:
    a = Moments(np.array([1.0, 2.0, 0.0]), np.diag([4.0, 1.0, 0.0]))
    b = Moments(np.array([0.0, 0.0, 0.0]), np.diag([1.0, 9.0, 2.0]))
    assert frechet_distance(a, b) == pytest.approx(5 + (2 - 1) ** 2 + (1 - 3) ** 2 + 2, abs=1e-10)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)


def test_frechet_distance_agrees_with_the_general_matrix_root() -> None:
    random = np.random.default_rng(0)
    a = moments(random.normal(size=(400, 12)) @ random.normal(size=(12, 12)))
    b = moments(random.normal(size=(300, 12)) @ random.normal(size=(12, 12)) + 0.5)
    root = sqrtm(a.covariance @ b.covariance).real
    expected = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance + b.covariance - 2 * root)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-8)


def test_moments_refuse_too_little() -> None:
    with pytest.raises(ValueError, match="N >= 2"):
        moments(np.zeros((1, 4)))


def test_digits_floor_is_the_documented_one() -> None:
    metrics = on_pixels(open_dataset("digits"))
    floor = frechet_distance(metrics.moments("train"), metrics.moments("test"))
    assert 0.40 < floor < 0.50


def test_pixels_are_measured_in_minus_one_to_one_and_clipped() -> None:
    digits = open_dataset("digits")
    records = torch.tensor([-3.0, 0.0, 8.0, 16.0, 99.0]).reshape(5, 1, 1, 1)
    pixels = to_pixels(digits, digits.scaling.to_model(records))
    np.testing.assert_allclose(pixels[:, 0], [-1, -1, 0, 1, 1], atol=1e-6)


def test_real_digits_pass_their_own_metrics() -> None:
    digits = open_dataset("digits")
    records, labels = digits.first("test", 1000)
    summary = on_pixels(digits).summary(digits.scaling.to_model(records.double()), labels)
    assert summary["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert summary["variance_ratio"] == pytest.approx(1)
    assert summary["class_accuracy"] == summary["class_accuracy_test"] > 0.985
    assert summary["nearest_train_distance"] == pytest.approx(summary["nearest_train_distance_test"])
    copies, copied_labels = digits.first("train", 300)
    memorized = on_pixels(digits).summary(digits.scaling.to_model(copies.double()), copied_labels)
    assert memorized["nearest_train_distance"] == pytest.approx(0, abs=1e-5)


def test_nearest_distance() -> None:
    found = nearest_distance(np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 0.0]]))
    np.testing.assert_allclose(found, [1, 4])


def test_proportional_labels_keep_the_frequencies() -> None:
    labels = torch.tensor([0] * 5 + [1] * 3 + [3] * 2)
    drawn = proportional_labels(labels, 1001, 4)
    assert torch.bincount(drawn, minlength=4).tolist() in (
        [501, 300, 0, 200],
        [500, 301, 0, 200],
        [500, 300, 0, 201],
    )
    assert abs(int((drawn[:100] == 0).sum()) - 50) <= 1  # classes alternate
