"""Checks of the CUDA ratio operations. Plain functions that need torch alone: pytest collects them through
test_ratio_cuda.py, and ``python -m benchmarks --device cuda`` runs them before it times.

Tolerance: an error against the float64 reference is at most twice that of the same formulas in PyTorch with
bfloat16 matrix products, plus rounding.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.ops import compiled, reference_ratio
from diffratio_fast.ops.divergences import DIVERGENCES
from diffratio_fast.ops.ratio import weight_shapes

# channels, height, width of the image, patch, channels C, blocks, hidden units
SHAPES = {
    "digits": (1, 8, 8, 2, 64, 2, 128),
    "odd": (3, 10, 6, 2, 40, 2, 50),
    "fashion": (1, 32, 32, 4, 64, 2, 128),
    "65 tokens": (2, 26, 10, 2, 64, 1, 96),
    "129 tokens": (1, 43, 3, 1, 128, 2, 256),
    "CIFAR-10": (3, 32, 32, 2, 128, 4, 256),
    "ImageNet-64": (3, 64, 64, 4, 64, 3, 256),
    "latents": (4, 64, 64, 4, 128, 2, 512),
    "256 channels": (4, 32, 32, 4, 256, 2, 512),
    "256 channels and tokens": (4, 64, 64, 4, 256, 2, 512),
}


class Problem:
    """One network, images, conditioning; all on the GPU, float32."""

    def __init__(self, name: str, batch: int = 5, draws: int = 2, seed: int = 0) -> None:
        channels, height, across, patch, width, depth, hidden = SHAPES[name]
        tokens = (height // patch) * (across // patch)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).cuda()

        shapes = weight_shapes(tokens, width, depth, hidden, channels * patch**2)
        self.weights = [normal(*shape) / shape[-1] ** 0.5 for shape in shapes.values()]
        self.weights[-1] /= tokens**0.5
        self.real, self.fake = normal(2, batch, channels, height, across).unbind()
        self.sigma = torch.rand(batch, draws, generator=generator).cuda() * 2 + 0.05
        self.weight = self.sigma**2
        self.conditioning = normal(batch, draws, width + depth * hidden) * 0.5
        self.rng, self.index = ops.make_rng(-3, 2**33 + 7).cuda(), torch.arange(batch).cuda() * 5 + 2**31
        self.upstream = normal(batch)

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same in another type, but for rng and index."""
        other = object.__new__(Problem)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [w.to(dtype) for w in value]
            other.__dict__[name] = value.to(dtype) if getattr(value, "is_floating_point", bool)() else value
        return other


def log_ratio(p: Problem, module: Any) -> list[Tensor]:
    return [module.log_ratio(p.weights, p.real, p.sigma[:, 0], p.conditioning[:, 0])]


def log_ratio_gradients(p: Problem, module: Any) -> list[Tensor]:
    weights = [w.clone().requires_grad_() for w in p.weights]
    x, e = p.real.clone().requires_grad_(), p.conditioning[:, 0].clone().requires_grad_()
    value = module.log_ratio(weights, x, p.sigma[:, 0], e)
    return list(torch.autograd.grad(value, [x, e, *weights], p.upstream.to(value.dtype)))


def score_difference(p: Problem, module: Any, divergence: str = "jensen_shannon") -> list[Tensor]:
    outcome = module.score_difference(
        p.weights, p.fake, p.sigma, p.conditioning, p.rng, p.index, weight=p.weight, divergence=divergence
    )
    return [outcome.gradient, outcome.log_ratio]


def ratio_loss(p: Problem, module: Any) -> list[Tensor]:
    e = p.conditioning
    outcome = module.ratio_loss(p.weights, p.real, p.fake, p.sigma[:, 0], e[:, 0], e[:, -1], p.rng, p.index)
    return [
        outcome.loss,
        outcome.log_ratio_real,
        outcome.log_ratio_fake,
        *outcome.weight_gradients,
        *outcome.conditioning_gradients,
    ]


Operation = Callable[[Problem, Any], list[Tensor]]
OPERATIONS: tuple[Operation, ...] = (log_ratio, log_ratio_gradients, score_difference, ratio_loss)


def error_of(got: Tensor, exact: Tensor) -> float:
    return float((got.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))


def compare(p: Problem, operation: Operation) -> None:
    got = operation(p, ops)
    exact = operation(p.cast(torch.float64), reference_ratio)
    with torch.autocast("cuda", torch.bfloat16):
        usual = operation(p, reference_ratio)
    for i, (a, b, c) in enumerate(zip(got, exact, usual, strict=True)):
        assert not a.isnan().any(), f"{operation.__name__}, result {i}: NaN"
        error, allowed = error_of(a, b), 2 * error_of(c, b) + 2e-3
        assert error <= allowed, f"{operation.__name__}, result {i}: error {error:.1e}, allowed {allowed:.1e}"


@contextlib.contextmanager
def form(name: str, workspace_bytes: int) -> Iterator[None]:
    compiled.module.use_ratio_loss_form(name, workspace_bytes)
    try:
        yield
    finally:
        compiled.module.use_ratio_loss_form("automatic", 256 << 20)


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def check_the_kernels_are_used() -> None:
    if torch.cuda.get_device_properties(0).shared_memory_per_block_optin < 163 * 1024:
        return  # such a GPU runs the larger ones in plain PyTorch, as it should
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in SHAPES:
            log_ratio(Problem(name, 1), ops)


def check_parity() -> None:
    for name, operation in itertools.product(SHAPES, OPERATIONS):
        compare(Problem(name), operation)


def check_divergences() -> None:
    for divergence in DIVERGENCES:
        p = Problem("CIFAR-10", draws=3)
        compare(p, lambda p, module: score_difference(p, module, divergence))  # noqa: B023
        outcome = ops.score_difference(
            p.weights, p.fake, p.sigma, p.conditioning, p.rng, p.index, weight=p.weight, divergence=divergence
        )
        clamped = DIVERGENCES[divergence].factor(outcome.log_ratio)[1].float().mean()
        torch.testing.assert_close(outcome.clamped_fraction, clamped)


def check_many_samples() -> None:
    """More units than blocks, in several slices, in both forms; a repeat gives the same bits."""
    for name, (how, workspace) in itertools.product(
        ("digits", "CIFAR-10", "latents"), itertools.product(("one launch", "several"), (256 << 20, 24 << 20))
    ):
        p = Problem(name, batch=200)
        with form(how, workspace):
            compare(p, ratio_loss)
            same(ratio_loss(p, ops), ratio_loss(p, ops))
        compare(p, score_difference)
        same(score_difference(p, ops), score_difference(p, ops))


def check_bfloat16_images_and_weights() -> None:
    p = Problem("CIFAR-10").cast(torch.bfloat16)
    for operation in (log_ratio, score_difference, ratio_loss):
        for a, b in zip(operation(p, ops), operation(p.cast(torch.float64), reference_ratio), strict=True):
            assert error_of(a, b) < 3e-2, operation.__name__


def check_packed_weights() -> None:
    p = Problem("CIFAR-10")
    packed = ops.pack_weights(p.weights)
    arguments = (p.weights, p.real, p.sigma[:, 0], p.conditioning[:, 0])
    same([ops.log_ratio(*arguments, packed=packed)], [ops.log_ratio(*arguments)])


def check_nan_sigma_stays_in_its_sample() -> None:
    p = Problem("CIFAR-10")
    p.sigma[1, 0] = float("nan")
    gradient, values = score_difference(p, ops)
    assert values[1, 0].isnan() and not values[[0, 2, 3, 4]].isnan().any() and not values[1, 1].isnan()
    assert gradient[1].isnan().any() and not gradient[[0, 2, 3, 4]].isnan().any()


def check_other_networks_take_the_other_way() -> None:
    SHAPES["too wide"] = (3, 32, 32, 2, 256, 1, 256)  # 256 tokens of 256 channels
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            compare(Problem("too wide", 2), log_ratio)
        assert any("plain PyTorch" in str(w.message) for w in said)
    finally:
        del SHAPES["too wide"]


def check_graph_replay() -> None:
    """A captured graph reads the seed and step of its replay, and the weights as they then are."""
    p = Problem("CIFAR-10", batch=16)
    for operation in (score_difference, ratio_loss):
        operation(p, ops)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = operation(p, ops)
        for step in (1, 5):
            p.rng.copy_(ops.make_rng(7, step))
            p.weights[4] *= 1.01
            graph.replay()
            torch.cuda.synchronize()
            same(out, operation(p, ops))


def check_no_synchronisation() -> None:
    p = Problem("CIFAR-10")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for operation in (log_ratio, score_difference, ratio_loss):
            operation(p, ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_compiles() -> None:
    p = Problem("digits")
    got = torch.compile(lambda: score_difference(p, ops), fullgraph=True)()
    same(got, score_difference(p, ops))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]


def run_all() -> int:
    """Run every check; returns how many there were."""
    for check in CHECKS:
        check()
    return len(CHECKS)
