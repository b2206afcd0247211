"""The floating-point half of the noise contract: normals, bit for bit and against exact formulas."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from diffratio_fast import ops
from diffratio_fast.ops import Purpose, compiled, reference_noise

needs_compiled = pytest.mark.skipif(compiled.module is None, reason="the compiled module was not built")
LEVELS = compiled.build_info().get("simd_levels", [])


def exact_normals(words: np.ndarray) -> np.ndarray:
    """The contract's formulas in float64 on words [..., 2n]."""
    u = ((words[..., 0::2] >> 8) + 1) * 2.0**-24
    theta = 2 * np.pi * words[..., 1::2] * 2.0**-32
    radius = np.sqrt(-2 * np.log(u))
    return np.stack((radius * np.cos(theta), radius * np.sin(theta)), -1).reshape(words.shape)


def test_normals_agree_with_float64():
    rng, index = ops.make_rng(3, 1), torch.arange(64)
    normals = ops.normal(rng, index, (20000,), Purpose.NOISE_REAL).numpy().astype(np.float64)
    words = ops.random_words(rng, index, Purpose.NOISE_REAL, 20000).numpy()
    assert np.abs(normals - exact_normals(words)).max() < 1e-6


def test_the_error_bound_over_radii_and_angles():
    """|r c - R C| <= |r - R| + r |c - C| + the rounding of the product.

    Here every radius above 3 and a 32nd of the others; over all 2^24 radii the bound is 9.35e-7.
    """
    radii = torch.cat((torch.arange(1 << 18), torch.arange(1 << 18, 1 << 24, 31)))
    words = radii << 8
    radius_error, largest = 0.0, 0.0
    angles = torch.arange(0, 1 << 32, 65521, dtype=torch.int64)
    cosine, sine = reference_noise._cosine_sine(angles)
    theta = angles.double() * (2 * math.pi / 2**32)
    angle_error = max(
        float((cosine.double() - theta.cos()).abs().max()), float((sine.double() - theta.sin()).abs().max())
    )
    assert angle_error < 8e-8
    for part in words.split(1 << 20):
        radius = reference_noise._radius(part).double()
        exact = torch.sqrt(-2 * torch.log(((part >> 8) + 1).double() * 2.0**-24))
        error = (radius - exact).abs()
        rounding = torch.where(radius > 4, 2.0**-22, 2.0**-23)  # half a unit in the last place
        total = error + radius * angle_error + rounding
        radius_error, largest = max(radius_error, float(error.max())), max(largest, float(total.max()))
    assert radius_error < 3.6e-7
    assert largest < 1e-6


@needs_compiled
@pytest.mark.parametrize("level", LEVELS)
def test_every_simd_level_gives_the_bits_of_the_reference(level):
    try:
        compiled.module.use_simd_level(level)
    except RuntimeError as error:
        assert "does not support" in str(error)  # this processor
        return
    try:
        rng, index = ops.make_rng(-3, 2**40 + 7), torch.tensor([0, 5, 2**35 + 9, -1])
        for size in (1, 2, 3, 5, 63, 64, 65, 1000, 2048, 2049, 7001):
            expected = reference_noise.normal(rng, index, (size,), 3, substep=2, draw=9)
            assert torch.equal(ops.normal(rng, index, (size,), 3, substep=2, draw=9), expected)
    finally:
        compiled.module.use_simd_level(os.environ.get("DIFFRATIO_SIMD", ""))


@pytest.mark.slow
@needs_compiled
def test_the_level_is_chosen_by_the_environment():
    code = "from diffratio_fast import build_info; print(build_info().get('simd_level'))"
    environment = os.environ | {"DIFFRATIO_SIMD": "portable"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "portable", result.stderr
    environment["DIFFRATIO_SIMD"] = "mmx"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == "None"
    assert result.stderr.count("\n") == 1 and "no level 'mmx'" in result.stderr


def test_normals_do_not_depend_on_threads():
    rng, index, threads = ops.make_rng(1, 1), torch.arange(33), torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(ops.normal(rng, index, (3, 61, 61), 3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_a_prefix_of_a_longer_sample_is_the_shorter_sample():
    rng, index = ops.make_rng(1, 1), torch.arange(3)
    long = ops.normal(rng, index, (501,), 3)
    for size in (1, 6, 63, 500):
        assert torch.equal(long[:, :size], ops.normal(rng, index, (size,), 3))


def test_extreme_words():
    words = torch.tensor([0, 255, 0xFFFFFF00, 0xFFFFFFFF])
    radius = reference_noise._radius(words)
    assert radius.tolist()[0] == radius.tolist()[1] == pytest.approx(math.sqrt(48 * math.log(2)), abs=1e-6)
    assert radius.tolist()[2:] == [0.0, 0.0]  # u = 1
    # The four quarter turns are exact.
    cosine, sine = reference_noise._cosine_sine(torch.tensor([0, 1 << 30, 1 << 31, 3 << 30]))
    assert cosine.tolist() == [1, 0, -1, 0] and sine.tolist() == [0, 1, 0, -1]


def test_moments_and_tails():
    """Each statistic within 4.5 of its standard deviations (fixed seed; a wrong law fails by far more)."""
    n = 4_000_000
    x = ops.normal(ops.make_rng(11, 0), torch.arange(400), (n // 400,), Purpose.NOISE_REAL).double().flatten()
    # Mean and standard deviation of x^k: E x^k and sqrt(E x^2k - (E x^k)^2).
    moments = {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10395 - 225)}
    for power, (mean, variance) in moments.items():
        assert abs(float((x**power).mean()) - mean) < 4.5 * math.sqrt(variance / n), power
    for threshold in (0.5, 1.0, 2.0, 3.0, 4.0, 4.5):
        p = math.erfc(threshold / math.sqrt(2)) / 2
        for tail in (x > threshold, x < -threshold):
            assert abs(int(tail.sum()) - n * p) < 4.5 * math.sqrt(n * p), threshold


def test_neighbors_and_purposes_are_independent():
    rng, index = ops.make_rng(11, 0), torch.arange(200)
    streams = {
        "real": ops.normal(rng, index, (5000,), Purpose.NOISE_REAL),
        "fake": ops.normal(rng, index, (5000,), Purpose.NOISE_FAKE),
        "substep": ops.normal(rng, index, (5000,), Purpose.NOISE_REAL, substep=1),
        "draw": ops.normal(rng, index, (5000,), Purpose.NOISE_REAL, draw=1),
        "step": ops.normal(ops.make_rng(11, 1), index, (5000,), Purpose.NOISE_REAL),
        "index": ops.normal(rng, index + 200, (5000,), Purpose.NOISE_REAL),
    }
    real = streams["real"].double().flatten()
    n = real.numel()
    for name, other in streams.items():
        if name != "real":
            y = other.double().flatten()
            assert abs(float((real * y).mean())) < 4.5 / math.sqrt(n), name
            assert abs(float(((real**2 - 1) * (y**2 - 1)).mean())) < 4.5 * 2 / math.sqrt(n), name
    for lag in (1, 2, 3, 4):  # within pairs (also of their squares), within counters, across them
        x, y = real[:-lag], real[lag:]
        assert abs(float((x * y).mean())) < 4.5 / math.sqrt(n), lag
        assert abs(float(((x**2 - 1) * (y**2 - 1)).mean())) < 4.5 * 2 / math.sqrt(n), lag


@pytest.mark.parametrize("function", [ops.normal, reference_noise.normal])
def test_shapes_and_errors(function):
    rng, index = ops.make_rng(0, 0), torch.arange(3)
    assert function(rng, index, (), 0).shape == (3,)
    assert function(rng, index, (2, 0, 4), 0).shape == (3, 2, 0, 4)
    assert function(rng, index[:0], (2, 4), 0).shape == (0, 2, 4)
    assert function(rng, index, [2, 5], Purpose.LATENT).dtype == torch.float32
    with pytest.raises(ValueError, match="must not be negative"):
        function(rng, index, (2, -1), 0)
    with pytest.raises(ValueError, match="at most 2\\^34"):
        function(rng, index, (1 << 20, 1 << 20), 0)
