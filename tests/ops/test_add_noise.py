"""add_noise: the compiled operation against the reference, gradients, compilation, errors."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffratio_fast import ops
from diffratio_fast.ops import Purpose, compiled, reference_noise

needs_compiled = pytest.mark.skipif(compiled.module is None, reason="the compiled module was not built")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
RNG = ops.make_rng(17, 4)


def arguments(*shape: int, dtype: torch.dtype = torch.float32, inputs: int = 1):
    x = tuple(torch.randn(shape).to(dtype) for _ in range(inputs))
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    sigma = torch.rand(shape[0], dtype=compute) * 3
    purposes = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE, Purpose.NOISE_GENERATOR)[:inputs]
    index = torch.arange(shape[0]) * 5 + 2**32 - 3
    return (x, sigma, RNG, index, purposes) if inputs > 1 else (x[0], sigma, RNG, index, purposes[0])


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(0, 4),
    rest=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    long=st.sampled_from([0, 0, 0, 2047, 2048, 4111]),
    source=st.sampled_from(FLOATS),
    target=st.sampled_from([None, *FLOATS]),
    inputs=st.integers(1, 3),
    scaled=st.booleans(),
    shared=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(-(2**63), 2**63 - 1),
    step=st.integers(0, 2**40),
    draw=st.integers(0, 65535),
)
def test_equals_the_reference_bit_for_bit(
    batch, rest, long, source, target, inputs, scaled, shared, layout, seed, step, draw
):
    if long:
        rest = (long,)
    torch.manual_seed(seed % 2**63)
    x = [torch.randn(batch, *rest).mul(10).to(source) for _ in range(inputs)]
    if layout == "transposed" and rest:
        x = [v.transpose(0, -1).contiguous().transpose(0, -1) for v in x]
    elif layout == "strided":
        x = [torch.stack((v, v), -1)[..., 1] for v in x]
    elif layout == "expanded" and batch:
        x = [v[:1].expand(v.shape) for v in x]
    before = [v.clone() for v in x]
    sigma, scale = torch.rand(batch), torch.rand(batch) if scaled else None
    rng, index = ops.make_rng(seed, step), torch.randint(-(2**40), 2**40, (batch,))
    purposes = (5,) * inputs if shared else tuple(range(inputs))
    call = (tuple(x), sigma, rng, index, purposes)
    options = {"substep": draw % 256, "draw": draw, "scale": scale, "dtype": target}
    got, expected = ops.add_noise(*call, **options), reference_noise.add_noise(*call, **options)
    assert got.shape == (batch * inputs, *rest) and got.dtype == (target or source)
    assert got.is_contiguous() and torch.equal(got, expected)
    assert all(torch.equal(a, b) for a, b in zip(x, before, strict=True))


def test_definition():
    x, sigma, rng, index, purpose = arguments(5, 3, 8, 8)
    eps = ops.normal(rng, index, (3, 8, 8), purpose)
    scale = torch.rand(5)
    expected = (x.double() + sigma.double().view(5, 1, 1, 1) * eps.double()) * scale.double().view(5, 1, 1, 1)
    got = ops.add_noise(x, sigma, rng, index, purpose, scale=scale)
    assert torch.allclose(got.double(), expected, rtol=1e-6, atol=1e-6)


def test_a_tuple_is_its_parts_in_order():
    (real, fake), sigma, rng, index, _ = arguments(4, 33, inputs=2)
    both = ops.add_noise((real, fake), sigma, rng, index, (3, 4))
    apart = [ops.add_noise(real, sigma, rng, index, 3), ops.add_noise(fake, sigma, rng, index, 4)]
    assert torch.equal(both, torch.cat(apart))
    assert not torch.equal(both[:4] - real, both[4:] - fake)  # the halves have independent noise


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
@pytest.mark.parametrize("size", [33, 4096, 6000])
def test_inputs_of_one_purpose_share_their_noise(dtype, size):
    x, sigma, rng, index, _ = arguments(4, size, dtype=dtype, inputs=3)
    for purposes in ((3, 3), (3, 3, 3), (3, 4, 3)):
        together = ops.add_noise(x[: len(purposes)], sigma, rng, index, purposes)
        apart = [ops.add_noise(v, sigma, rng, index, p) for v, p in zip(x, purposes, strict=False)]
        assert torch.equal(together, torch.cat(apart))


def test_shared_noise_cancels_in_the_difference_of_a_pair():
    (real, fake), sigma, rng, index, _ = arguments(4, 3, 8, 8, dtype=torch.float64, inputs=2)
    first, second = ops.add_noise((real, fake), sigma, rng, index, ops.SHARED_NOISE).chunk(2)
    torch.testing.assert_close(first - second, real - fake)
    first, second = ops.add_noise((real, fake), sigma, rng, index, ops.SEPARATE_NOISE).chunk(2)
    assert (first - second - (real - fake)).std() > 0.5


def test_inputs_of_two_types_are_promoted():
    (real, fake), sigma, rng, index, purposes = arguments(4, 33, inputs=2)
    got = ops.add_noise((real, fake.bfloat16()), sigma, rng, index, purposes)
    assert got.dtype == torch.float32
    assert torch.equal(got, ops.add_noise((real, fake.bfloat16().float()), sigma, rng, index, purposes))


def test_special_values_survive():
    values = torch.tensor([0.0, -0.0, 1e-45, 65504, 65520, 3.4e38, float("inf"), -float("inf"), float("nan")])
    x, sigma = values.repeat(2, 1), torch.tensor([0.0, 1e30])
    for target in FLOATS:
        got = ops.add_noise(x, sigma, RNG, torch.arange(2), 0, dtype=target)
        expected = reference_noise.add_noise(x, sigma, RNG, torch.arange(2), 0, dtype=target)
        assert torch.equal(got.isnan(), expected.isnan()) and got[:, -1].isnan().all()
        assert torch.equal(got.nan_to_num(7.0), expected.nan_to_num(7.0))


@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16])
def test_every_16_bit_number_passes_unchanged(source):
    """With sigma = 0 the whole chain of conversions is the identity."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(source)
    got = ops.add_noise(x[None], torch.zeros(1), RNG, torch.zeros(1, dtype=torch.int64), 0)[0]
    # fma(0, eps, x0) keeps x0 except for -0 + 0 = 0, and NaN.
    keep = ~x.isnan() & (x != 0)
    assert torch.equal(got[keep].view(torch.int16), x[keep].view(torch.int16))
    assert got[x.isnan()].isnan().all() and (got[x == 0] == 0).all()


@pytest.mark.parametrize("target", [torch.float16, torch.bfloat16])
def test_narrowing_rounds_as_torch_does(target):
    bits = torch.randint(-(2**31), 2**31, (1 << 18,), dtype=torch.int64).to(torch.int32)
    special = torch.tensor(
        [0x33000000, 0x33000001, 0x38800000, 0x387FFFFF, 0x477FEFFF, 0x477FF000, 0x7F7FFFFF]
    )
    x = torch.cat((bits, special.to(torch.int32))).view(torch.float32)
    x = x[~x.isnan() & (x != 0)]
    got = ops.add_noise(x[None], torch.zeros(1), RNG, torch.zeros(1, dtype=torch.int64), 0, dtype=target)[0]
    assert torch.equal(got, x.to(target))


@pytest.mark.parametrize("function", [ops.add_noise, reference_noise.add_noise])
def test_gradient_float64(function):
    (real, fake), sigma, rng, index, purposes = arguments(3, 2, 5, dtype=torch.float64, inputs=2)
    scale = torch.rand(3, dtype=torch.float64)
    real.requires_grad_()
    fake.requires_grad_()
    for s in (None, scale):
        assert torch.autograd.gradcheck(
            lambda a, b, s=s: function((a, b), sigma, rng, index, purposes, scale=s), (real, fake)
        )


@pytest.mark.parametrize("function", [ops.add_noise, reference_noise.add_noise])
@pytest.mark.parametrize(("source", "target"), list(itertools.product(FLOATS, FLOATS)))
def test_gradient_of_all_types(function, source, target):
    (real, fake), sigma, rng, index, purposes = arguments(3, 2, 5, dtype=source, inputs=2)
    scale = torch.rand(3)
    fake.requires_grad_()
    out = function((real, fake), sigma, rng, index, purposes, scale=scale, dtype=target)
    upstream = torch.randn(out.shape).to(target)
    out.backward(upstream)
    assert real.grad is None and fake.grad.dtype == source
    assert torch.equal(fake.grad, (upstream[3:].float() * scale.view(3, 1, 1)).to(source))


@needs_compiled
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64])
def test_opcheck(dtype):
    (real, fake), sigma, rng, index, _ = arguments(3, 2, 5, dtype=dtype, inputs=2)
    fake.requires_grad_()
    for scale, target in ((None, dtype), (sigma.clone(), dtype)):
        torch.library.opcheck(
            torch.ops.diffratio.add_noise, ([real, fake], sigma, rng, index, [3, 4], 1, 2, scale, target)
        )


@needs_compiled
def test_opcheck_of_the_generators():
    torch.library.opcheck(torch.ops.diffratio.random_words, (RNG, torch.arange(3), 1, 5, 2, 3))
    torch.library.opcheck(torch.ops.diffratio.normal, (RNG, torch.arange(3), [2, 5], 1, 2, 3))


@needs_compiled
def test_compiles_without_graph_breaks():
    (real, fake), sigma, _, index, purposes = arguments(4, 3, 8, inputs=2)
    fake.requires_grad_()

    def step(real, fake, sigma, rng, index):
        z = ops.normal(rng, index, (3, 8), Purpose.LATENT)
        u = ops.uniform(rng, index, Purpose.SIGMA_RATIO, 2)
        noised = ops.add_noise((real, fake + z), sigma, rng, index, purposes, scale=1 / sigma)
        return (noised * 2).sum() + u.sum()

    # aot_eager traces autograd too, and needs no compiler.
    optimized = torch.compile(step, fullgraph=True, backend="aot_eager")
    for seed in (1, 2):  # the noise of the first call must not be a constant of the graph
        rng = ops.make_rng(seed, 0)
        expected = step(real, fake, sigma, rng, index)
        got = optimized(real, fake, sigma, rng, index)
        torch.testing.assert_close(got, expected)
        wanted, found = torch.autograd.grad(expected, fake)[0], torch.autograd.grad(got, fake)[0]
        torch.testing.assert_close(found, wanted)


def test_does_not_mutate():
    (real, fake), sigma, rng, index, purposes = arguments(4, 300, inputs=2)
    scale = torch.rand(4)
    tensors = (real, fake, sigma, rng, index, scale)
    copies, versions = [t.clone() for t in tensors], [t._version for t in tensors]
    ops.add_noise((real, fake), sigma, rng, index, purposes, scale=scale)
    ops.normal(rng, index, (5,), 0)
    ops.random_words(rng, index, 0, 5)
    assert all(torch.equal(t, c) for t, c in zip(tensors, copies, strict=True))
    assert versions == [t._version for t in tensors]


@pytest.mark.parametrize("function", [ops.add_noise, reference_noise.add_noise])
def test_nan_sigma_raises(function):
    x, sigma, rng, index, purpose = arguments(4, 6)
    sigma[2] = float("nan")
    with pytest.raises(ValueError, match="sigma contains NaN"):
        function(x, sigma, rng, index, purpose)


@pytest.mark.parametrize("function", [ops.add_noise, reference_noise.add_noise])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x0": torch.zeros(4, 6, dtype=torch.int32)}, TypeError, "x0 must be float32"),
        ({"x0": torch.tensor(1.0)}, ValueError, r"must be \[B, ...\]"),
        ({"x0": (torch.zeros(4, 6), torch.zeros(4, 5)), "purpose": (3, 4)}, ValueError, "alike"),
        ({"x0": (torch.zeros(4, 6),), "purpose": (3, 4)}, ValueError, "one purpose per input"),
        ({"x0": (), "purpose": ()}, ValueError, "one purpose per input"),
        ({"x0": torch.zeros(4, 6, device="meta")}, ValueError, "x0 is on meta"),
        ({"sigma": torch.zeros(3)}, ValueError, r"sigma must be \[4\]"),
        ({"sigma": torch.zeros(4, 1)}, ValueError, r"sigma must be \[4\]"),
        ({"sigma": torch.zeros(4, dtype=torch.int64)}, TypeError, "sigma must be floating"),
        ({"sigma": torch.zeros(4, requires_grad=True)}, ValueError, "not differentiable in sigma"),
        ({"scale": torch.zeros(5)}, ValueError, r"scale must be \[4\]"),
        ({"scale": torch.zeros(4, requires_grad=True)}, ValueError, "not differentiable in scale"),
        ({"index": torch.zeros(5, dtype=torch.int64)}, ValueError, "index must have one entry per sample"),
        ({"index": torch.zeros(4)}, ValueError, "index must be int64"),
        ({"rng": torch.zeros(3, dtype=torch.int64)}, ValueError, "rng must be int64"),
        ({"purpose": 256}, ValueError, "purpose must be 0 to 255"),
        ({"substep": 256}, ValueError, "substep must be"),
        ({"draw": -1}, ValueError, "draw must be"),
        ({"dtype": torch.float64}, TypeError, "cannot be"),
        ({"dtype": torch.int32}, TypeError, "cannot be"),
        ({"x0": torch.zeros(4, 6, dtype=torch.float64), "dtype": torch.float32}, TypeError, "cannot be"),
    ],
)
def test_wrong_arguments(function, change, error, message):
    x, sigma, rng, index, purpose = arguments(4, 6)
    call = {"x0": x, "sigma": sigma, "rng": rng, "index": index, "purpose": purpose} | change
    with pytest.raises(error, match=message):
        function(**call)


@needs_compiled
@pytest.mark.parametrize(
    "change",
    [
        {0: []},
        {0: [torch.zeros(4, 6)] * 9, 4: [0] * 9},
        {0: [torch.zeros(4, 6), torch.zeros(4, 7)]},
        {0: [torch.zeros(4, 6), torch.zeros(4, 6).double()]},
        {0: [torch.zeros(4, 6).int()] * 2},
        {1: torch.zeros(3)},
        {1: torch.zeros(4).double()},
        {3: torch.arange(5)},
        {4: [3]},
        {4: [3, 300]},
        {7: torch.zeros(4).half()},
        {8: torch.float64},
        {8: torch.int64},
    ],
)
def test_the_compiled_operation_checks_too(change):
    call = [[torch.zeros(4, 6)] * 2, torch.zeros(4), RNG, torch.arange(4), [3, 4], 0, 0, None, torch.float32]
    for position, value in change.items():
        call[position] = value
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        torch.ops.diffratio.add_noise(*call)
