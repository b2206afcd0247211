"""The CPU ratio operations against the reference, on every SIMD level; opcheck, threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.ops import compiled, ratio, reference_ratio
from diffratio_fast.ops.ratio import HAS_OPERATIONS, weight_shapes
from diffratio_fast.ops.ratio_scratch import cuda_packed_bytes, scratch_bytes

pytestmark = pytest.mark.skipif(not HAS_OPERATIONS, reason="the compiled module was not built")
LEVELS = compiled.module.build_info()["simd_levels"] if compiled.module is not None else []

# channels, height, width, patch, width, depth, hidden, with an energy head
SIZES = {
    "digits": (1, 8, 8, 2, 64, 2, 128),
    "color": (3, 16, 16, 2, 64, 1, 128),
    "latents": (4, 16, 16, 4, 128, 2, 256),
    "odd": (2, 6, 15, 3, 20, 3, 35),
    "one token": (3, 5, 5, 5, 3, 1, 2),
    "energy": (3, 16, 16, 2, 64, 2, 128, True),
    "odd energy": (2, 6, 15, 3, 20, 2, 35, True),
}


@pytest.fixture(params=LEVELS)
def level(request) -> Iterator[str]:
    before = compiled.module.build_info()["simd_level"]
    try:
        compiled.module.use_simd_level(request.param)
    except RuntimeError:
        pytest.skip("this processor does not support it")
    yield request.param
    compiled.module.use_simd_level(before)


def problem(size: str, batch: int = 5, draws: int = 2) -> dict[str, Any]:
    channels, height, across, patch, width, depth, hidden, *energy = SIZES[size]
    tokens = height * across // patch**2
    shapes = weight_shapes(tokens, width, depth, hidden, channels * patch**2, bool(energy))
    image = (batch, channels, height, across)
    return {
        "weights": [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes.values()],
        "real": torch.randn(image),
        "fake": torch.randn(image),
        "sigma": torch.rand(batch, draws) + 0.1,
        "weight": torch.rand(batch, draws) + 0.5,
        "conditioning": torch.randn(batch, draws, width + depth * hidden),
        "rng": ops.make_rng(3, 8),
        "index": torch.arange(batch) * 3 + 2**33,
    }


def double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return [double(item) for item in value]


def score(module: Any, p: dict[str, Any], name: str) -> tuple[Tensor, ...]:
    return tuple(
        module.score_difference(
            p["weights"], p["fake"], p["sigma"], p["conditioning"], p["rng"], p["index"],
            weight=p["weight"], divergence=name, substep=3,
        )
    )  # fmt: skip


def loss(module: Any, p: dict[str, Any]) -> list[Tensor]:
    outcome = module.ratio_loss(
        p["weights"], p["real"], p["fake"], p["sigma"][:, 0], p["conditioning"][:, 0],
        p["conditioning"][:, 1], p["rng"], p["index"], substep=2,
    )  # fmt: skip
    return [*outcome[:3], *outcome[3], *outcome[4]]


def log_ratio(module: Any, p: dict[str, Any]) -> list[Tensor]:
    """The log ratio and all its gradients, with a different upstream gradient for every sample."""
    inputs = [*p["weights"], p["real"], p["conditioning"][:, 0]]
    inputs = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = module.log_ratio(inputs[:-2], inputs[-2], p["sigma"][:, 0], inputs[-1])
    upstream = torch.linspace(-1, 2, len(out), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, upstream, allow_unused=True)]


def assert_close(got: Any, expected: Any) -> None:
    """To 1e-5 of each tensor's largest value."""
    for a, b in zip(got, expected, strict=True):
        assert a.shape == b.shape and a.dtype == torch.float32
        if b.numel():
            assert float((a - b).abs().max()) <= 1e-5 * max(float(b.abs().max()), 1e-3)


@pytest.mark.parametrize("size", SIZES)
def test_float32_agrees_with_the_float64_reference(level, size):
    p = problem(size)
    exact = {name: double(value) for name, value in p.items()}
    for name in ("reverse_kl", "squared_hellinger"):
        assert_close(score(ops, p, name), score(reference_ratio, exact, name))
    assert_close(loss(ops, p), loss(reference_ratio, exact))
    assert_close(log_ratio(ops, p), log_ratio(reference_ratio, exact))


@pytest.mark.parametrize("name", DIVERGENCES)
def test_every_divergence(name):
    p = problem("digits", batch=20)
    got = score(ops, p, name)
    assert_close(got, score(reference_ratio, {key: double(value) for key, value in p.items()}, name))
    clamp = DIVERGENCES[name].clamp
    outside = float(DIVERGENCES[name].factor(got[1])[1].float().mean())
    assert 0 < outside < 1 if clamp else outside == 0


@pytest.mark.parametrize("operation", [log_ratio, loss, lambda m, p: score(m, p, "jensen_shannon")])
@pytest.mark.parametrize("size", ["digits", "latents"])
def test_bfloat16_errs_no_more_than_twice_what_torch_does(size, operation):
    p = problem(size, batch=8)
    low = {name: rounded(value) for name, value in p.items()}
    low |= {name: p[name] for name in ("sigma", "weight")}
    expected = operation(reference_ratio, {name: double(value) for name, value in low.items()})
    got = operation(ops, low)
    with torch.autocast("cpu", torch.bfloat16):
        usual = operation(reference_ratio, {name: single(value) for name, value in low.items()})
    for a, b, c in zip(got, usual, expected, strict=True):
        allowed = 2 * (b - c).abs().max() + 2**-8 * c.abs().max()
        assert float((a - c).abs().max()) <= float(allowed)


def rounded(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.bfloat16() if value.is_floating_point() else value
    return [rounded(item) for item in value]


def single(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    return [single(item) for item in value]


def test_bfloat16_gradients_have_the_weights_type():
    p = problem("digits")
    weights = [weight.bfloat16().requires_grad_() for weight in p["weights"]]
    arguments = (p["sigma"][:, 0], p["conditioning"][:, 0], p["conditioning"][:, 1], p["rng"], p["index"])
    outcome = ops.ratio_loss(weights, p["real"].bfloat16(), p["fake"].bfloat16(), *arguments)
    outcome.loss.backward()
    assert outcome.loss.dtype == torch.float32 and all(w.grad.dtype == torch.bfloat16 for w in weights)


def test_results_do_not_depend_on_the_number_of_threads():
    p = problem("digits", batch=19)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([*score(ops, p, "jeffreys"), *loss(ops, p), *log_ratio(ops, p)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_nothing_is_mutated_and_strides_do_not_matter():
    p = problem("color")
    plain = [*score(ops, p, "reverse_kl"), *loss(ops, p)]
    strided = dict(p)
    for name in ("real", "fake", "conditioning"):
        strided[name] = torch.stack((p[name], p[name]), -1)[..., 0]
    strided["weights"] = [w.transpose(0, -1).contiguous().transpose(0, -1) for w in p["weights"]]
    copies = [tensor.clone() for tensor in strided["weights"]]
    got = [*score(ops, strided, "reverse_kl"), *loss(ops, strided)]
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(copies, strided["weights"], strict=True))


def test_an_empty_batch():
    p = problem("digits", batch=0)
    assert score(ops, p, "reverse_kl")[0].shape == (0, 1, 8, 8)
    got = log_ratio(ops, p)
    assert got[0].shape == (0,) and all(bool((g == 0).all()) for g in got[1:])
    with pytest.raises(ValueError, match="no samples"):
        loss(ops, p)


def test_opcheck():
    p = problem("odd", batch=2)
    weights = [weight.requires_grad_() for weight in p["weights"]]
    sigma, e = p["sigma"], p["conditioning"]
    raw = torch.ops.diffratio
    first, second = e[:, 0].clone().requires_grad_(), e[:, 1].clone().requires_grad_()
    real = p["real"].clone().requires_grad_()
    torch.library.opcheck(raw.log_ratio, (weights, real, sigma[:, 0].clone(), first, 0.5, None))
    constants = [weight.detach() for weight in weights]
    stream, packed = (p["rng"], p["index"]), ops.pack_weights(weights)
    torch.library.opcheck(raw.pack_weights, (constants,))
    torch.library.opcheck(
        raw.score_difference, (constants, p["fake"], sigma, e, p["weight"], *stream, 1, 5, 0, 0.5, packed)
    )
    torch.library.opcheck(
        raw.ratio_loss,
        (weights, p["real"], p["fake"], sigma[:, 0].clone(), first, second, *stream, [3, 4], 0, 0.5, packed),
    )


def test_compiles_without_graph_breaks():
    p = problem("digits", batch=3)
    weights = [weight.requires_grad_() for weight in p["weights"]]

    def step(fake: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        arguments = (p["sigma"][:, 0], 2 * e[:, 0], e[:, 1], p["rng"], p["index"])
        outcome = ops.ratio_loss(weights, p["real"], fake, *arguments)
        got = ops.score_difference(
            weights, fake, p["sigma"], e, p["rng"], p["index"], weight=p["weight"], divergence="jeffreys"
        )
        return outcome.loss * 2, got.gradient

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        value, gradient = function(p["fake"], p["conditioning"])
        results.append([value.detach(), gradient, *torch.autograd.grad(value, weights)])
    torch.testing.assert_close(results[1], results[0])


def test_the_choice_of_cuda_kernels_compiles_without_graph_breaks(monkeypatch):
    asked = []

    def fit(operation: str, sizes: list[int], device: int) -> bool:
        asked.append((operation, *sizes, device))
        return True

    monkeypatch.setattr(compiled.module, "ratio_kernels_fit", fit, raising=False)
    p = problem("color")

    def step(x: Tensor) -> Tensor:
        sizes = ratio.checks.layout(p["weights"], x)
        return x + 1 if ratio._kernels_fit("ratio_loss", *sizes, 99) else x

    traced = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(traced(p["real"]), p["real"] + 1) and torch.equal(traced(p["fake"]), p["fake"] + 1)
    assert asked == [("ratio_loss", 3, 16, 16, 2, 64, 64, 1, 128, False, 99)]


def test_the_compiled_operations_check_too():
    p = problem("digits")
    names = ("weights", "fake", "sigma", "conditioning", "weight", "rng", "index")
    good = [*(p[name] for name in names), 0, 5, 0, 0.5, None]
    torch.ops.diffratio.score_difference(*good)
    short = [*p["weights"][:4], p["weights"][4][:, :, :3], *p["weights"][5:]]
    changes = {
        0: [[], short, [w.double() for w in p["weights"]]],
        1: [
            torch.zeros(5, 0, 8, 8),
            torch.zeros(5, 1, 8, 9),
            torch.zeros(5, 3, 8, 8),
            torch.zeros(5, 64),
            torch.zeros(4, 1, 8, 8),
        ],
        2: [torch.ones(5), torch.ones(5, 3), torch.ones(5, 0)],
        3: [torch.zeros(5, 2, 7), torch.zeros(5, 1, 320)],
        4: [torch.zeros(5)],
        5: [torch.zeros(3, dtype=torch.int64), torch.zeros(2)],
        6: [torch.arange(4)],
        7: [-1, 6],
        8: [256],
        9: [256],
    }
    for position, values in changes.items():
        for value in values:
            call = [*good]
            call[position] = value
            with pytest.raises((ValueError, TypeError, RuntimeError)):
                torch.ops.diffratio.score_difference(*call)


def test_the_tables_of_divergences_agree():
    assert compiled.module.divergences == list(DIVERGENCES)


def test_the_plan_of_packed_weights_by_hand():
    """T = 15 is padded to 16, C = 40 and H = 50 to 64, P = 12 to 16; L = 2; parts are multiples of 512."""
    weights = [torch.zeros(shape) for shape in weight_shapes(15, 40, 2, 50, 12).values()]
    position_and_head, mix_bias = 2 * 4 * 16 * 64, 512
    patch, mix = 2 * 2 * 16 * 64, 2 * 2 * 2 * 16 * 16  # each also transposed
    up_and_down = (2 + 3) * 2 * 2 * 64 * 64
    assert cuda_packed_bytes(weights) == position_and_head + mix_bias + patch + mix + up_and_down


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("operation", ["log_ratio", "score_difference", "ratio_loss", "log_ratio_backward"])
def test_plans_grow_with_samples_up_to_the_workspace(operation, device):
    weights = [torch.zeros(shape) for shape in weight_shapes(64, 64, 2, 128, 48).values()]
    few, many = (scratch_bytes(operation, weights, n, device=device, threads=4) for n in (2, 1 << 16))
    assert cuda_packed_bytes(weights) < 1 << 20
    assert 0 < few <= many < (256 << 20) + (64 << 20)
    assert (few < many) or (operation, device) == ("log_ratio", "cuda")  # log_ratio stages nothing


def test_the_plan_refuses_an_unknown_operation():
    with pytest.raises(ValueError, match="no such operation"):
        compiled.module.plan_ratio("add_noise", "cpu", [1, 8, 8, 2, 16, 64, 1, 64, 0], 1, 1)
