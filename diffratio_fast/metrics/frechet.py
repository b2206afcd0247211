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
    """Mean and covariance without regularization, in float64, of features [N, D] with N >= 2."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < 2:
        raise ValueError(f"features must be [N, D] with N >= 2, not {x.shape}")
    return Moments(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False)))


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a^1/2 C_b C_a^1/2)^1/2) (Dowson and Landau 1982).

    The trace of the square root is the sum of the square roots of a symmetric matrix's eigenvalues, so
    singular covariances (constant pixels) need no regularization.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ b.covariance @ root).clip(0)).sum()
    difference = a.mean - b.mean
    return float(difference @ difference + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


class RunningMoments:
    """Running moments of features, in float64; blocks are merged by the method of Chan et al. (1979)."""

    BLOCK = 1024
    """Features per merge; the cost of a merge is quadratic in the dimension."""

    def __init__(self, dimension: int) -> None:
        self.count = 0
        self._merged = 0
        self._pending: list[Array] = []
        self._mean = np.zeros(dimension)
        self._scatter = np.zeros((dimension, dimension))

    def add(self, features: npt.ArrayLike) -> None:
        """Add features [n, D]."""
        self._pending.append(np.asarray(features, np.float64))
        self.count += len(self._pending[-1])
        if self.count - self._merged >= self.BLOCK:
            self._merge()

    def _merge(self) -> None:
        x = np.concatenate(self._pending)
        self._pending = []
        mean = x.mean(0)
        centered = x - mean
        step = mean - self._mean
        self._scatter += centered.T @ centered
        self._scatter += np.outer(step, step) * (self._merged * len(x) / self.count)
        self._mean = self._mean + step * (len(x) / self.count)
        self._merged = self.count

    def moments(self) -> Moments:
        """Mean and unbiased covariance of at least two features."""
        if self.count < 2:
            raise ValueError("moments need at least two features")
        if self._merged < self.count:
            self._merge()
        return Moments(self._mean.copy(), self._scatter / (self.count - 1))
