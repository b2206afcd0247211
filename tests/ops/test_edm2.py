"""The EDM2 operations: reference by gradcheck, CPU kernels by the reference on every SIMD level, opcheck."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diffratio_fast import ops
from diffratio_fast.networks.layers import Dropout, dropout_stream
from diffratio_fast.networks.magnitude import mp_cat, mp_silu, mp_sum, normalize
from diffratio_fast.ops import compiled, edm2, reference_edm2

needs_operations = pytest.mark.skipif(not edm2.HAS_OPERATIONS, reason="the compiled module was not built")
LEVELS = compiled.module.build_info()["simd_levels"] if compiled.module is not None else []
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPES = [(2, 24, 4, 8), (3, 10, 5, 3), (1, 36, 17, 17), (2, 6, 1, 1)]


class Operation(NamedTuple):
    """``fused``, its definition and the networks' unfused path, on ``inputs`` made from a shape."""

    fused: Callable[..., object]
    reference: Callable[..., object]
    eager: Callable[..., object]
    inputs: Callable[[Sequence[int]], list[Tensor]]


def noise(seed: int = 3) -> dict[str, Tensor | int]:
    return {"rng": ops.make_rng(seed, 8), "substep": 1, "layer": 2}


def images(count: int) -> Callable[[Sequence[int]], list[Tensor]]:
    return lambda shape: [2 * torch.randn(*shape) for _ in range(count)]


def dropped(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda x, c: function(x, c, dropout=0.3, index=torch.arange(len(x)) + 2**33, **noise())


def eager_dropped(x: Tensor, condition: Tensor) -> Tensor:
    layer = Dropout(0.3)
    others = [Dropout(0.1), Dropout(0.1), layer]
    with dropout_stream(
        torch.nn.ModuleList(others), ops.make_rng(3, 8), torch.arange(len(x)) + 2**33, substep=1
    ):
        return layer(mp_silu(x * (condition + 1)[:, :, None, None]))


def eager_qkv(x: Tensor) -> Tensor:
    return normalize(x, dim=-1).permute(2, 0, 3, 1, 4)


def with_silu(x: Tensor) -> tuple[Tensor, Tensor]:
    return x, mp_silu(x)


OPERATIONS = {
    "pixel_norm_silu": Operation(
        edm2.pixel_norm_silu,
        reference_edm2.pixel_norm_silu,
        lambda x: with_silu(normalize(x, dim=1)),
        images(1),
    ),
    "scale_silu": Operation(
        edm2.scale_silu,
        reference_edm2.scale_silu,
        lambda x, c: mp_silu(x * (c + 1)[:, :, None, None]),
        lambda shape: [torch.randn(*shape), torch.randn(*shape[:2])],
    ),
    "scale_silu with dropout": Operation(
        dropped(edm2.scale_silu),
        dropped(reference_edm2.scale_silu),
        eager_dropped,
        lambda shape: [torch.randn(*shape), torch.randn(*shape[:2])],
    ),
    "mp_silu": Operation(edm2.mp_silu, reference_edm2.mp_silu, mp_silu, images(1)),
    "sum_clamp": Operation(
        lambda a, b: edm2.sum_clamp(a, b, 0.3, 1.5),
        lambda a, b: reference_edm2.sum_clamp(a, b, 0.3, 1.5),
        lambda a, b: mp_sum(a, b, 0.3).clamp(-1.5, 1.5),
        images(2),
    ),
    "sum without clamp": Operation(
        lambda a, b: edm2.sum_clamp(a, b, 0.3),
        lambda a, b: reference_edm2.sum_clamp(a, b, 0.3),
        lambda a, b: mp_sum(a, b, 0.3),
        images(2),
    ),
    "sum_clamp_silu": Operation(
        lambda a, b: edm2.sum_clamp_silu(a, b, 0.4, 2.0),
        lambda a, b: reference_edm2.sum_clamp_silu(a, b, 0.4, 2.0),
        lambda a, b: with_silu(mp_sum(a, b, 0.4).clamp(-2.0, 2.0)),
        images(2),
    ),
    "cat_silu": Operation(
        lambda a, b: edm2.cat_silu(a, b, 0.4),
        lambda a, b: reference_edm2.cat_silu(a, b, 0.4),
        lambda a, b: with_silu(mp_cat(a, b, 0.4)),
        lambda shape: [torch.randn(*shape), torch.randn(shape[0], 2 * shape[1], *shape[2:])],
    ),
    "ones_channel": Operation(
        lambda x: edm2.ones_channel(x, torch.arange(1, len(x) + 1)),
        lambda x: reference_edm2.ones_channel(x, torch.arange(1, len(x) + 1)),
        lambda x: F.pad(
            x * torch.arange(1, len(x) + 1)[:, None, None, None].to(x), (0, 0, 0, 0, 0, 1), value=1.0
        ),
        images(1),
    ),
    "qkv_norm": Operation(
        edm2.qkv_norm,
        reference_edm2.qkv_norm,
        lambda x: tuple(eager_qkv(x)),
        lambda shape: [torch.randn(shape[0], shape[2] * shape[3], 3, 2, shape[1])],
    ),
}


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = compiled.module.build_info()["simd_level"]
    try:
        compiled.module.use_simd_level(request.param)
    except RuntimeError:
        pytest.skip("this processor does not support it")
    yield request.param
    compiled.module.use_simd_level(before)


def results(function: Callable[..., object], inputs: list[Tensor]) -> list[Tensor]:
    """Outputs and gradients of one fixed random combination of them, all as float64."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outputs = list(out) if isinstance(out, tuple) else [out]
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(y.shape, generator=generator).to(y.dtype) for y in outputs]  # type: ignore[attr-defined]
    gradients = torch.autograd.grad(outputs, leaves, upstream)  # type: ignore[arg-type]
    return [x.detach().double() for x in (*outputs, *gradients)]  # type: ignore[attr-defined]


def arranged(inputs: list[Tensor], dtype: torch.dtype, layout: str) -> list[Tensor]:
    return [
        x.to(dtype, memory_format=LAYOUTS[layout] if x.dim() == 4 else torch.contiguous_format)
        for x in inputs
    ]


def largest_error(found: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a - b).abs().max()) for a, b in zip(found, exact, strict=True)]


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference_has_the_derivative_of_its_formula(name: str) -> None:
    operation = OPERATIONS[name]
    inputs = [x.double().requires_grad_() for x in operation.inputs((2, 6, 3, 2))]
    assert torch.autograd.gradcheck(operation.reference, inputs)


@pytest.mark.parametrize("name", OPERATIONS)
def test_reference_is_what_the_networks_compute(name: str) -> None:
    operation = OPERATIONS[name]
    inputs = [x.double() for x in operation.inputs((2, 8, 3, 4))]
    for found, expected in zip(
        results(operation.reference, inputs), results(operation.eager, inputs), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@needs_operations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_float32_kernels_agree_with_the_reference(
    level: str, name: str, shape: Sequence[int], layout: str
) -> None:
    operation = OPERATIONS[name]
    inputs = arranged(operation.inputs(shape), torch.float32, layout)
    exact = results(operation.reference, [x.double() for x in inputs])
    for found, expected in zip(results(operation.fused, inputs), exact, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_operations
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_16_bit_kernels_err_at_most_twice_as_much_as_pytorch(
    level: str, name: str, layout: str, dtype: torch.dtype
) -> None:
    operation = OPERATIONS[name]
    inputs = arranged(operation.inputs((3, 20, 7, 5)), dtype, layout)
    exact = results(operation.reference, [x.double() for x in inputs])
    fused = largest_error(results(operation.fused, inputs), exact)
    eager = largest_error(results(operation.eager, inputs), exact)
    rounding = [float(x.abs().max()) * torch.finfo(dtype).eps / 2 for x in exact]
    for ours, theirs, unit in zip(fused, eager, rounding, strict=True):
        assert ours <= 2 * theirs + unit


@needs_operations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_results_keep_the_layout_and_do_not_depend_on_threads(name: str, layout: str) -> None:
    operation = OPERATIONS[name]
    inputs = arranged(operation.inputs((3, 40, 20, 20)), torch.bfloat16, layout)
    out = operation.fused(*inputs)
    first = out[0] if isinstance(out, tuple) else out
    if first.dim() == 4 and name != "qkv_norm":
        assert first.is_contiguous(memory_format=LAYOUTS[layout])
    before = torch.get_num_threads()
    one = results(operation.fused, inputs)
    try:
        torch.set_num_threads(3)
        three = results(operation.fused, inputs)
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


@needs_operations
def test_stores_around_the_cache_give_the_same_numbers() -> None:
    a, b = torch.randn(2, 1, 64, 320, 320).unbind(0)  # 26 MB each: beyond the threshold
    found = edm2.sum_clamp_silu(a, b, 0.3, 1.0)
    for x, y in zip(found, reference_edm2.sum_clamp_silu(a, b, 0.3, 1.0), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)
    last = a.contiguous(memory_format=torch.channels_last)
    for x, y in zip(edm2.pixel_norm_silu(last), reference_edm2.pixel_norm_silu(a), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5, check_stride=False)


@needs_operations
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name: str, layout: str) -> None:
    inputs = arranged(OPERATIONS[name].inputs((2, 6, 3, 4)), torch.float32, layout)
    packet = torch.ops.diffratio
    leaves = [x.requires_grad_() for x in inputs]
    index, rng = torch.arange(2), ops.make_rng(1, 2)
    calls = {
        "pixel_norm_silu": (packet.pixel_norm_silu, leaves),
        "scale_silu": (packet.scale_silu, [*leaves, None, None, 0.0, 10, 0, 0]),
        "scale_silu with dropout": (packet.scale_silu, [*leaves, rng, index, 0.2, 10, 1, 3]),
        "mp_silu": (packet.mp_silu, leaves),
        "sum_clamp": (packet.sum_clamp, [*leaves, 0.3, 1.5, False]),
        "sum without clamp": (packet.sum_clamp, [*leaves, 0.3, math.inf, False]),
        "sum_clamp_silu": (packet.sum_clamp, [*leaves, 0.3, 1.5, True]),
        "cat_silu": (packet.cat_silu, [*leaves, 0.4]),
        "ones_channel": (packet.ones_channel, [*leaves, torch.rand(2), torch.float32]),
        "qkv_norm": (packet.qkv_norm, leaves),
    }
    operation, arguments = calls[name]
    torch.library.opcheck(operation.default, tuple(arguments))


@needs_operations
def test_a_gradient_that_nobody_sends_counts_as_zero() -> None:
    x = torch.randn(2, 8, 3, 3, requires_grad=True)
    for which in (0, 1):
        for fused, reference, arguments in (
            (edm2.pixel_norm_silu, reference_edm2.pixel_norm_silu, (x,)),
            (edm2.cat_silu, reference_edm2.cat_silu, (x, x.detach(), 0.3)),
            (edm2.sum_clamp_silu, reference_edm2.sum_clamp_silu, (x, x.detach().flip(0), 0.3, 1.0)),
        ):
            found = torch.autograd.grad(fused(*arguments)[which].square().sum(), x)[0]
            expected = torch.autograd.grad(reference(*arguments)[which].square().sum(), x)[0]
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@needs_operations
def test_nan_stays_nan_and_infinity_is_clamped() -> None:
    for dtype in edm2.FLOATS:
        x = torch.randn(2, 16, 4, 4).to(dtype)
        x[0, 3, 1, 1] = math.nan
        normalized, activated = edm2.pixel_norm_silu(x)
        assert normalized[0, :, 1, 1].isnan().all() and activated[0, :, 1, 1].isnan().all()
        assert normalized.isnan().sum() == 16
        assert edm2.scale_silu(x, torch.zeros(2, 16, dtype=dtype)).isnan().sum() == 1
        out, activated = edm2.sum_clamp_silu(x, x, 0.3, 2.0)
        assert out.isnan().sum() == 1 and activated.isnan().sum() == 1
        infinite = torch.full((1, 2, 4, 4), math.inf, dtype=dtype)
        assert (edm2.sum_clamp(infinite, infinite, 0.3, 2.0) == 2).all()


def test_pixels_of_zeros_have_no_infinite_gradient() -> None:
    x = torch.zeros(1, 8, 2, 2, requires_grad=True)
    normalized, activated = edm2.pixel_norm_silu(x)
    (normalized.sum() + activated.sum()).backward()
    assert (normalized == 0).all() and x.grad is not None and x.grad.isfinite().all()


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_empty_batch_gives_an_empty_result(name: str) -> None:
    inputs = OPERATIONS[name].inputs((0, 6, 3, 2))
    for x in results(OPERATIONS[name].fused, inputs):
        assert x.numel() == 0


def test_autocast_takes_what_it_is_given() -> None:
    a, b = torch.randn(2, 2, 8, 3, 3).unbind(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert edm2.pixel_norm_silu(a)[1].dtype == torch.float32
        assert edm2.pixel_norm_silu(a.bfloat16())[1].dtype == torch.bfloat16
        assert edm2.sum_clamp(a.bfloat16(), b, 0.3).dtype == torch.float32


@needs_operations
@pytest.mark.slow
def test_torch_compile_traces_a_block_without_a_break() -> None:
    def block(x: Tensor, skip: Tensor, condition: Tensor) -> Tensor:
        y, a = edm2.pixel_norm_silu(x)
        h = edm2.scale_silu(a, condition)
        joined, activated = edm2.cat_silu(edm2.sum_clamp(y, h, 0.3, 256.0), skip, 0.5)
        return joined.square().mean() + activated.mean()

    inputs = [torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 4, 4, 4), torch.randn(2, 8)]
    expected = torch.autograd.grad(block(*inputs), inputs[0])[0]
    compiled_block = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled_block(*inputs), inputs[0])[0], expected)


def test_bad_arguments_are_one_clear_error() -> None:
    x = torch.randn(2, 8, 4, 4)
    for call, message in (
        (lambda: edm2.pixel_norm_silu(x[0]), "images"),
        (lambda: edm2.scale_silu(x, torch.randn(2, 7)), "condition must be"),
        (lambda: edm2.scale_silu(x, torch.randn(2, 8), dropout=1.0), "dropout"),
        (lambda: edm2.scale_silu(x, torch.randn(2, 8), dropout=0.5), "rng"),
        (lambda: edm2.sum_clamp(x, x[:, :4], 0.3), "one shape"),
        (lambda: edm2.sum_clamp(x, x, 1.5), "between 0 and 1"),
        (lambda: edm2.sum_clamp(x, x, 0.3, -1.0), "clip"),
        (lambda: edm2.sum_clamp(x, x, 0.3, math.nan), "clip"),
        (lambda: edm2.cat_silu(x, x[:, :, :2], 0.5), "agree"),
        (lambda: edm2.cat_silu(x, x[:, :0], 0.5), "channels"),
        (lambda: edm2.ones_channel(x, torch.ones(3)), "scale"),
        (lambda: edm2.qkv_norm(x), "qkv"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: edm2.pixel_norm_silu(x.int()),
        lambda: edm2.sum_clamp(x.int(), x.int(), 0.3),
        lambda: edm2.qkv_norm(torch.ones(1, 2, 3, 1, 4, dtype=torch.int64)),
    ):
        with pytest.raises(TypeError, match="float32"):
            call()
