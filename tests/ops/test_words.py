"""The integer half of the noise contract: Philox words, streams, uniforms."""

from __future__ import annotations

import pytest
import torch

from diffratio_fast import ops
from diffratio_fast.ops import Purpose, compiled, reference_noise

needs_compiled = pytest.mark.skipif(compiled.module is None, reason="the compiled module was not built")
LEVELS = compiled.build_info().get("simd_levels", [])

# Random123's tests/kat_vectors, philox4x32 with 10 rounds: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
VECTORS = [tuple([int(word, 16) for word in part.split()] for part in vector) for vector in KNOWN]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers_of_the_reference(counter, key, expected):
    as_tensors = [torch.tensor(word) for word in counter], [torch.tensor(word) for word in key]
    assert [int(word) for word in reference_noise.philox4x32_10(*as_tensors)] == expected


@needs_compiled
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers_of_every_simd_level(level, counter, key, expected):
    try:
        assert compiled.module.philox(level, counter, key) == expected
    except ValueError as error:
        assert "does not support" in str(error)  # this processor


def test_the_counter_has_the_documented_layout():
    seed, step, index = 0x299F31D0A4093822, 0x785A308D3, 0x513198A2E
    rng = ops.make_rng(seed, step)
    words = ops.random_words(rng, torch.tensor([index]), 3, 12, substep=0x70, draw=0x7344)
    for element in (0, 4, 8):
        counter = [element // 4, step & 0xFFFFFFFF, index & 0xFFFFFFFF, 0x03707344]
        expected = reference_noise.philox4x32_10(
            tuple(torch.tensor(c) for c in counter), (torch.tensor(0xA4093822), torch.tensor(0x299F31D0))
        )
        assert words[0, element : element + 4].tolist() == [int(word) for word in expected]


@pytest.mark.parametrize("count", [0, 1, 4, 7, 130])
def test_words_equal_the_reference(count):
    rng, index = ops.make_rng(-7, 11), torch.tensor([0, 3, 2**32 - 1, 2**40 + 1, -1])
    words = ops.random_words(rng, index, Purpose.LATENT, count, substep=255, draw=65535)
    assert words.shape == (5, count) and words.dtype == torch.int64
    assert torch.equal(words, reference_noise.random_words(rng, index, 0, count, substep=255, draw=65535))


def test_a_sample_does_not_depend_on_its_batch():
    rng, index = ops.make_rng(5, 6), torch.arange(10)
    together = ops.random_words(rng, index, 1, 9)
    apart = torch.cat([ops.random_words(rng, index[i : i + 1], 1, 9) for i in range(10)])
    assert torch.equal(together, apart)
    assert torch.equal(together[:, :5], ops.random_words(rng, index, 1, 5))


def test_every_coordinate_of_a_stream_matters():
    index = torch.arange(4)
    streams = [
        ops.random_words(ops.make_rng(seed, step), index + shift, purpose, 4, substep=substep, draw=draw)
        for seed, step, shift, purpose, substep, draw in [
            (0, 0, 0, 0, 0, 0), (1, 0, 0, 0, 0, 0), (2**32, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0),
            (0, 0, 9, 0, 0, 0), (0, 0, 0, 1, 0, 0), (0, 0, 0, 0, 1, 0), (0, 0, 0, 0, 0, 1),
        ]
    ]  # fmt: skip
    assert torch.cat(streams).unique().numel() == 8 * 16


def test_uniforms_are_in_the_open_interval_and_even():
    u = ops.uniform(ops.make_rng(1, 2), torch.arange(1000), Purpose.SIGMA_RATIO, 100)
    assert u.dtype == torch.float64 and u.min() > 0 and u.max() < 1
    # 100 bins of 1000 expected: chi-squared with 99 degrees of freedom, mean 99, standard deviation 14.
    counts = torch.histc(u.float(), bins=100, min=0, max=1)
    assert 50 < float(((counts - 1000) ** 2 / 1000).sum()) < 155


def test_uniforms_are_the_words():
    rng, index = ops.make_rng(1, 2), torch.arange(3)
    words = ops.random_words(rng, index, 4, 5)
    assert torch.equal(ops.uniform(rng, index, 4, 5), (words.double() + 0.5) / 2**32)


def test_purposes_are_unique_and_fit_the_counter():
    assert len({int(p) for p in Purpose}) == len(Purpose.__members__)
    assert all(0 <= p < 256 for p in Purpose)
    # The numbers are fixed: changing one silently changes every run.
    some = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE, Purpose.DATA_ORDER, Purpose.EVALUATION_FAKE)
    assert some == (3, 4, 9, 15)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((torch.zeros(2), torch.arange(3), 0, 1), {}, "rng must be int64"),
        ((torch.zeros(3, dtype=torch.int64), torch.arange(3), 0, 1), {}, "rng must be int64"),
        ((torch.zeros(2, dtype=torch.int64), torch.zeros(3), 0, 1), {}, "index must be int64"),
        (
            (torch.zeros(2, dtype=torch.int64), torch.zeros(3, 1, dtype=torch.int64), 0, 1),
            {},
            "index must be",
        ),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3, device="meta"), 0, 1), {}, "index is on meta"),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3), 256, 1), {}, "purpose must be"),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3), -1, 1), {}, "purpose must be"),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3), 0, 1), {"substep": 256}, "substep must be"),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3), 0, 1), {"draw": 65536}, "draw must be"),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3), 0, -1), {}, "must not be negative"),
        ((torch.zeros(2, dtype=torch.int64), torch.arange(3), 0, 2**34 + 1), {}, "at most 2\\^34"),
    ],
)
@pytest.mark.parametrize("function", [ops.random_words, reference_noise.random_words])
def test_wrong_arguments(function, arguments, options, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments, **options)


@needs_compiled
@pytest.mark.parametrize(
    "arguments",
    [
        (torch.zeros(2), torch.arange(3), 0, 1, 0, 0),
        (torch.zeros(2, dtype=torch.int64), torch.zeros(3), 0, 1, 0, 0),
        (torch.zeros(2, dtype=torch.int64), torch.arange(3), 999, 1, 0, 0),
        (torch.zeros(2, dtype=torch.int64), torch.arange(3), 0, -1, 0, 0),
    ],
)
def test_the_compiled_operation_checks_too(arguments):
    with pytest.raises(ValueError):
        torch.ops.diffratio.random_words(*arguments)


def test_make_rng():
    assert ops.make_rng(3, 4).tolist() == [3, 4]
    assert ops.make_rng(2**64 - 1, 2**32).tolist() == [-1, 2**32]
    with pytest.raises(ValueError, match="64 bits"):
        ops.make_rng(2**64, 0)
