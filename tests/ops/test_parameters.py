"""The parameter operations: reference by gradcheck and by PyTorch's Adam, CPU kernels by the reference."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffratio_fast.networks.magnitude import normalize
from diffratio_fast.ops import compiled, parameters, reference_parameters

needs_operations = pytest.mark.skipif(
    not parameters.HAS_OPERATIONS, reason="the compiled module was not built"
)
LEVELS = compiled.module.build_info()["simd_levels"] if compiled.module is not None else []
SHAPES = [(6, 5, 3, 3), (40, 64), (3, 7), (), (33,), (5, 600, 1, 1)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    before = compiled.module.build_info()["simd_level"]
    try:
        compiled.module.use_simd_level(request.param)
    except RuntimeError:
        pytest.skip("this processor does not support it")
    yield request.param
    compiled.module.use_simd_level(before)


def problem(dtype: torch.dtype = torch.float32, channels_last: bool = False) -> dict[str, Any]:
    def tensors(scale: float = 1.0) -> list[Tensor]:
        found = [scale * torch.randn(shape, dtype=dtype) for shape in SHAPES]
        if channels_last:
            found = [x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x for x in found]
        return found

    weights = tensors()
    marked = [x.dim() > 1 for x in weights]
    return {
        "weights": weights,
        "gradients": tensors(0.1),
        "first": tensors(0.1),
        "second": [x.square() for x in tensors(0.1)],
        "steps": [torch.full((), 3.0) for _ in SHAPES],
        "rate": 0.01,
        "beta1": 0.9,
        "beta2": 0.99,
        "averages": [(tensors(), 0.1), (tensors(), 0.7)],
        "normalize": marked,
        "normalized": [torch.empty_like(x) if on else None for x, on in zip(weights, marked, strict=True)],
    }


def copied(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype, copy=True)
    if isinstance(value, (list, tuple)):
        return [copied(x, dtype) for x in value]
    return value


def state(arguments: dict[str, Any]) -> list[Tensor]:
    lists = [arguments[name] for name in ("weights", "first", "second")]
    lists += [tensors for tensors, _ in arguments["averages"]]
    return [x for tensors in lists for x in tensors] + [x for x in arguments["normalized"] if x is not None]


def test_reference_is_what_the_networks_compute() -> None:
    weight = torch.randn(4, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference_parameters.normalize_weight, weight)
    expected = normalize(weight, (1, 2, 3)) / 27**0.5
    torch.testing.assert_close(reference_parameters.normalize_weight(weight), expected)


@pytest.mark.parametrize("decoupled", [True, False])
def test_reference_is_pytorchs_adam(decoupled: bool) -> None:
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    ours = [torch.randn(shape, dtype=torch.float64) for shape in SHAPES]
    theirs = [x.clone().requires_grad_() for x in ours]
    optimizer = kind(theirs, lr=0.01, betas=(0.8, 0.95), weight_decay=0.1)
    first, second = ([torch.zeros_like(x) for x in ours] for _ in range(2))
    for step in range(1, 4):
        gradients = [torch.randn_like(x) for x in ours]
        for x, g in zip(theirs, gradients, strict=True):
            x.grad = g
        optimizer.step()
        squares = reference_parameters.adam_step(
            ours, gradients, first, second, [torch.tensor(float(step))] * len(ours), rate=0.01, beta1=0.8,
            beta2=0.95, decay=0.1, decoupled=decoupled,
        )  # fmt: skip
        torch.testing.assert_close(squares.sqrt(), torch.stack(torch._foreach_norm(gradients)))
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y.detach())


@needs_operations
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("decoupled", [True, False])
def test_step_agrees_with_the_reference(level: str, decoupled: bool, channels_last: bool) -> None:
    ours = problem(channels_last=channels_last)
    exact = copied(list(ours.values()), torch.float64)
    exact = dict(zip(ours, exact, strict=True))
    kind: dict[str, Any] = {"decay": 0.2, "decoupled": decoupled}
    squares = parameters.adam_step(**ours, **kind)
    expected = reference_parameters.adam_step(**exact, **kind)
    torch.testing.assert_close(squares.double(), expected, rtol=1e-5, atol=1e-5)
    for x, y in zip(state(ours), state(exact), strict=True):
        torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)


@needs_operations
def test_normalized_is_a_function_of_the_stored_weight(level: str) -> None:
    """A resumed run computes it from the checkpoint, and must get the same bits."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        ours = problem()
        ours["normalized"] = [None if x is None else x.to(dtype) for x in ours["normalized"]]
        parameters.adam_step(**ours)
        for weight, normalized in zip(ours["weights"], ours["normalized"], strict=True):
            if normalized is not None:
                assert torch.equal(parameters.normalize_weight(weight, dtype), normalized)


@needs_operations
@pytest.mark.parametrize("channels_last", [False, True])
def test_gradient_of_a_normalized_weight(level: str, channels_last: bool) -> None:
    for shape in ((6, 5, 3, 3), (40, 64), (3, 7)):
        weight = torch.randn(shape)
        if channels_last and len(shape) == 4:
            weight = weight.contiguous(memory_format=torch.channels_last)
        upstream = torch.randn(shape)
        found = weight.clone(memory_format=torch.preserve_format).requires_grad_()
        (parameters.normalize_weight(found) * upstream).sum().backward()
        known = weight.clone(memory_format=torch.preserve_format).requires_grad_()
        value = parameters.normalize_weight(known.detach())
        (parameters.known_normalized(known, value) * upstream).sum().backward()
        exact = weight.double().requires_grad_()
        (reference_parameters.normalize_weight(exact) * upstream).sum().backward()
        assert found.grad is not None and known.grad is not None and exact.grad is not None
        torch.testing.assert_close(found.grad.double(), exact.grad, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.grad, known.grad)


@needs_operations
def test_opcheck() -> None:
    weight = torch.randn(4, 3, 3, 3, requires_grad=True)
    torch.library.opcheck(torch.ops.diffratio.normalize_weight.default, (weight, torch.bfloat16))
    arguments = problem()
    names = ("weights", "gradients", "first", "second", "steps")
    nothing = torch.empty(0)
    rest = (
        [],
        [nothing.clone() for _ in SHAPES],
        arguments["normalize"],
        0.1,
        None,
        [],
        [],
        0.9,
        0.99,
        1e-8,
        0.0,
    )
    torch.library.opcheck(
        torch.ops.diffratio.adam_step.default, (*(arguments[name] for name in names), *rest, True),
        test_utils=("test_schema", "test_faketensor"),
    )  # fmt: skip


@needs_operations
def test_numbers_may_lie_in_memory() -> None:
    ours = problem()
    other = dict(zip(ours, copied(list(ours.values()), torch.float32), strict=True))
    other["rate"] = torch.tensor(0.01)
    other["averages"] = [(tensors, torch.tensor(share)) for tensors, share in other["averages"]]
    parameters.adam_step(**ours)
    parameters.adam_step(**other)
    assert all(torch.equal(x, y) for x, y in zip(state(ours), state(other), strict=True))


@needs_operations
def test_a_gradient_that_is_not_finite_is_reported() -> None:
    for value in (float("nan"), float("inf")):
        ours = problem()
        ours["gradients"][1][2, 3] = value
        assert parameters.adam_step(**ours).isfinite().tolist() == [i != 1 for i in range(len(SHAPES))]


@needs_operations
def test_backward_notices_a_weight_that_changed() -> None:
    weight = torch.randn(3, 4, requires_grad=True)
    out = parameters.normalize_weight(weight).sum()
    with torch.no_grad():
        zeros = [torch.zeros(3, 4)]
        parameters.adam_step(
            [weight], [torch.ones(3, 4)], zeros, [torch.zeros(3, 4)], [torch.ones(())], rate=0.1, beta1=0.9,
            beta2=0.9,
        )  # fmt: skip
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@needs_operations
def test_bad_arguments_are_one_clear_error() -> None:
    with pytest.raises(ValueError, match="no weights"):
        parameters.adam_step([], [], [], [], [], rate=0.1, beta1=0.9, beta2=0.9)
    with pytest.raises(ValueError, match="out, in"):
        parameters.normalize_weight(torch.ones(3))
    with pytest.raises(TypeError, match="floating"):
        parameters.normalize_weight(torch.ones(3, 3, dtype=torch.int64))
    for name, value, error in (
        ("gradients", [torch.ones(2)] * len(SHAPES), ValueError),
        ("first", [torch.ones(())], ValueError),
        ("second", [torch.ones(x, dtype=torch.float64) for x in SHAPES], TypeError),
    ):
        with pytest.raises(error):
            parameters.adam_step(**{**problem(), name: value})
