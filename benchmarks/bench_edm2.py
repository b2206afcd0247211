"""The fused EDM2 operations against the networks' plain PyTorch, eager and compiled, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.harness import Case, Settings, rotation
from diffratio_fast.networks import magnitude
from diffratio_fast.ops import edm2, parameters, reference_edm2

SHAPE = {"cpu": (8, 128, 64, 64), "cuda": (64, 128, 64, 64)}
"""Images [N, C, H, W] of the first level of imagenet512-xs."""
DTYPES = (torch.float32, torch.bfloat16)


class Operation(NamedTuple):
    """A function of a module with the signatures of ``ops.edm2``, and the tensors that it reads and writes.

    ``passes``: tensors of ``inputs``' first shape read and written forward, and backward.
    """

    call: Callable[..., Any]
    inputs: Callable[[tuple[int, ...]], list[tuple[int, ...]]]
    passes: tuple[float, float]


OPERATIONS = {
    "pixel_norm_silu": Operation(lambda f, x: f.pixel_norm_silu(x), lambda s: [s], (3, 4)),
    "scale_silu": Operation(lambda f, x, c: f.scale_silu(x, c), lambda s: [s, s[:2]], (2, 3)),
    "sum_clamp": Operation(lambda f, a, b: f.sum_clamp(a, b, 0.3, 256.0), lambda s: [s, s], (3, 3)),
    "cat_silu": Operation(lambda f, a, b: f.cat_silu(a, b, 0.5), lambda s: [s, s], (6, 8)),
    "qkv_norm": Operation(
        lambda f, x: f.qkv_norm(x), lambda s: [(s[0], s[2] * s[3], 3, s[1] // 64, 64)], (6, 9)
    ),
}


def tensors(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


class Inputs:
    """Rotating inputs and upstream gradients of an operation, channels_last."""

    def __init__(self, settings: Settings, operation: Operation, dtype: torch.dtype) -> None:
        shape = SHAPE[settings.device.type]
        shapes = operation.inputs(shape)
        self.count = rotation(settings.device, torch.empty(shape, dtype=dtype).nbytes * len(shapes))

        def image(size: tuple[int, ...]) -> Tensor:
            x = torch.randn(size, device=settings.device).to(dtype)
            return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x

        self.sets = [[image(size).requires_grad_() for size in shapes] for _ in range(self.count)]
        outputs = tensors(operation.call(reference_edm2, *self.sets[0]))
        self.upstream = [torch.randn_like(y) for y in outputs]

    def __getitem__(self, i: int) -> list[Tensor]:
        return self.sets[i % self.count]


def forward(function: Callable[..., Any], inputs: Inputs) -> Callable[[int], Any]:
    @torch.no_grad()
    def call(i: int) -> Any:
        return function(*inputs[i])

    return call


def full(function: Callable[..., Any], inputs: Inputs) -> Callable[[int], Any]:
    def call(i: int) -> Any:
        return torch.autograd.grad(tensors(function(*inputs[i])), inputs[i], inputs.upstream)

    return call


def check(operation: Operation, inputs: Inputs) -> None:
    """Fused against the reference, at the rounding of the type."""
    some = [x.detach()[:2].requires_grad_() for x in inputs[0]]
    upstream = [u[:2] for u in inputs.upstream]
    found, expected = (
        [*tensors(out), *torch.autograd.grad(tensors(out), some, upstream)]
        for out in (operation.call(edm2, *some), operation.call(reference_edm2, *some))
    )
    tolerance = 1e-4 if some[0].dtype == torch.float32 else 3e-2
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * float(b.detach().abs().max()))


LAYERS = 12
"""Convolutions of 256 by 256 channels in a parameter step: 7 million weights."""


class Parameters:
    """Weights, gradients and state of a parameter step, and the two ways to make it."""

    def __init__(self, device: torch.device) -> None:
        def tensors() -> list[Tensor]:
            return [torch.randn(256, 256, 3, 3, device=device) for _ in range(LAYERS)]

        self.weights, self.gradients, self.average = tensors(), tensors(), tensors()
        self.first, self.second = tensors(), [x.square() for x in tensors()]
        self.steps = [torch.ones((), device=device) for _ in self.weights]
        self.normalized = [x.bfloat16() for x in self.weights]

    @torch.no_grad()
    def fused(self, i: int) -> Tensor:
        return parameters.adam_step(
            self.weights, self.gradients, self.first, self.second, self.steps, rate=1e-3, beta1=0.9,
            beta2=0.99, averages=[(self.average, 0.01)], normalize=[True] * LAYERS,
            normalized=self.normalized,
        )  # fmt: skip

    @torch.no_grad()
    def eager(self, i: int) -> Tensor:
        norms = torch.stack(torch._foreach_norm(self.gradients))
        torch._fused_adamw_(
            self.weights, self.gradients, self.first, self.second, [], self.steps, lr=1e-3, beta1=0.9,
            beta2=0.99, weight_decay=0.0, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        torch._foreach_lerp_(self.average, self.weights, 0.01)
        for weight, normalized in zip(self.weights, self.normalized, strict=True):
            rms = magnitude.root_mean_square(weight, [1, 2, 3]).clamp(min=magnitude.EPS)
            weight.mul_((1 - magnitude.EPS) / rms)
            normalized.copy_(magnitude.normalize(weight, (1, 2, 3)) / weight[0].numel() ** 0.5)
        return norms

    def check(self) -> None:
        """Both ways from one state."""
        other = copy.deepcopy(self)
        norms = self.fused(0).sqrt()
        torch.testing.assert_close(norms, other.eager(0), rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(self.weights, other.weights, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def cases(settings: Settings) -> Iterator[Case]:
    step = Parameters(settings.device)
    count = sum(x.numel() for x in step.weights)
    yield Case(
        "adam_step", f"{count / 1e6:.1f}M", "float32", "forward",
        {"fused": step.fused, "eager": step.eager}, step.check, bytes=float(count * 42),
    )  # fmt: skip
    for name, operation in OPERATIONS.items():
        for dtype in DTYPES:
            inputs = Inputs(settings, operation, dtype)
            shape = SHAPE[settings.device.type]
            size = torch.empty(shape, dtype=dtype).nbytes
            torch._dynamo.reset()
            calls = {
                "fused": lambda *x, o=operation: o.call(edm2, *x),
                "eager": lambda *x, o=operation: o.call(magnitude, *x),
                "compile": torch.compile(lambda *x, o=operation: o.call(magnitude, *x), dynamic=False),
            }
            for passes, wrap, touched in (
                ("forward", forward, operation.passes[0]),
                ("full", full, sum(operation.passes)),
            ):
                yield Case(
                    name, str(list(shape)), str(dtype).removeprefix("torch."), passes,
                    {provider: wrap(call, inputs) for provider, call in calls.items()},
                    lambda o=operation, i=inputs: check(o, i),  # type: ignore[misc]
                    bytes=float(size * touched),
                )  # fmt: skip
