"""The Fréchet distance between Gaussians fitted to two sets of features."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


class Moments(NamedTuple):
    """mean float64 [D] and unbiased covariance float64 [D, D]."""

    mean: Array
    covariance: Array


def moments(features: npt.ArrayLike) -> Moments:
    """Mean and unregularised covariance, in float64, of features [N, D] with N >= 2."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be [N >= 2, D], not {x.shape}")
    return Moments(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau 1982).

    The trace of the square root is the sum of the roots of the eigenvalues of a symmetric matrix, so
    singular covariances (pixels that never change) need no regularisation.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)
