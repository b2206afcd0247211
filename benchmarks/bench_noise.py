"""add_noise compared with plain PyTorch: randn, multiply, add (concatenate, cast)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Settings, rotation
from diffratio_fast import ops
from diffratio_fast.ops import reference_noise

SHAPES = ((128, 4, 64, 64), (512, 3, 32, 32))
DTYPES = (torch.float32, torch.bfloat16)
BOTH = ops.SEPARATE_NOISE


Noising = Callable[[Tensor, Tensor], Tensor]


def eager_one(x: Tensor, sigma: Tensor) -> Tensor:
    return x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)


def eager_both(real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    return torch.cat((eager_one(real, sigma), eager_one(fake, sigma)))


def eager_shared(real: Tensor, fake: Tensor, sigma: Tensor) -> Tensor:
    noise = sigma.view(-1, 1, 1, 1) * torch.randn_like(real)
    return torch.cat((real + noise, fake + noise))


class Inputs:
    """Rotating real and fake images, with seed and sample indices."""

    def __init__(self, settings: Settings, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        device = settings.device
        one = torch.empty(shape, dtype=dtype).nbytes
        self.count = rotation(device, 2 * one)
        template = torch.rand(shape, device=device)
        self.real = [(template - 0.5).to(dtype) for _ in range(self.count)]
        self.fake = [(0.5 - template).to(dtype) for _ in range(self.count)]
        self.index = torch.arange(shape[0], device=device)
        self.sigma = torch.rand(shape[0], device=device) + 0.1
        self.low_sigma = self.sigma.to(dtype)  # otherwise eager promotes bfloat16 images to float32
        self.rng = ops.make_rng(1, 2, device)

    def __call__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.real[i % self.count], self.fake[i % self.count]


def check_against_reference(inputs: Inputs) -> None:
    """Compare the fused result of the batch with the reference on some samples, bit for bit."""
    some = torch.tensor([0, 1, len(inputs.index) - 1], device=inputs.index.device)
    (real, fake), n = inputs(0), len(inputs.index)
    for purposes in (ops.SEPARATE_NOISE, ops.SHARED_NOISE):
        fused = ops.add_noise((real, fake), inputs.sigma, inputs.rng, inputs.index, purposes)
        expected = reference_noise.add_noise(
            (real[some], fake[some]), inputs.sigma[some], inputs.rng, inputs.index[some], purposes
        )
        assert torch.equal(fused[torch.cat((some, n + some))], expected), (
            "add_noise differs from its reference"
        )
        assert torch.equal(
            fused[:n], ops.add_noise(real, inputs.sigma, inputs.rng, inputs.index, purposes[0])
        )


def on_inputs(function: Noising, inputs: Inputs) -> Callable[[int], Any]:
    return lambda i: function(*inputs(i))


def full(function: Noising, inputs: Inputs) -> Callable[[int], Any]:
    """Forward, and backward to the fake images."""
    upstream: list[Tensor] = []

    def call(i: int) -> Tensor:
        real, fake = inputs(i)
        fake = fake.detach().requires_grad_()
        out = function(real, fake)
        if not upstream:
            upstream.append(torch.ones_like(out))
        return torch.autograd.grad(out, fake, upstream[0])[0]

    return call


def cases(settings: Settings) -> Iterator[Case]:
    for shape in SHAPES:
        for dtype in DTYPES:
            inputs = Inputs(settings, shape, dtype)
            size = float(torch.empty(shape, dtype=dtype).nbytes)
            torch._dynamo.reset()  # a new graph per shape instead of one with dynamic shapes
            yield from cases_of(inputs, str(list(shape)), str(dtype).removeprefix("torch."), size)


def cases_of(inputs: Inputs, shape: str, dtype: str, size: float) -> Iterator[Case]:
    sigma, low, rng, index = inputs.sigma, inputs.low_sigma, inputs.rng, inputs.index
    compiled_one = torch.compile(eager_one, dynamic=False)
    compiled_both = torch.compile(eager_both, dynamic=False)
    compiled_shared = torch.compile(eager_shared, dynamic=False)

    def check() -> None:
        check_against_reference(inputs)

    yield Case(
        "add_noise", shape, dtype, "forward",
        {
            "fused": lambda i: ops.add_noise(inputs(i)[0], sigma, rng, index, BOTH[0]),
            "eager": lambda i: eager_one(inputs(i)[0], low),
            "compile": lambda i: compiled_one(inputs(i)[0], low),
        },
        check, 2 * size,
    )  # fmt: skip
    pairs: dict[str, dict[str, Noising]] = {
        "add_noise both halves": {
            "fused": lambda real, fake: ops.add_noise((real, fake), sigma, rng, index, ops.SEPARATE_NOISE),
            "eager": lambda real, fake: eager_both(real, fake, low),
            "compile": lambda real, fake: compiled_both(real, fake, low),
        },
        "add_noise shared noise": {
            "fused": lambda real, fake: ops.add_noise((real, fake), sigma, rng, index, ops.SHARED_NOISE),
            "separate": lambda real, fake: ops.add_noise((real, fake), sigma, rng, index, ops.SEPARATE_NOISE),
            "eager": lambda real, fake: eager_shared(real, fake, low),
            "compile": lambda real, fake: compiled_shared(real, fake, low),
        },
    }
    for operation, both in pairs.items():
        forward = {name: on_inputs(function, inputs) for name, function in both.items()}
        yield Case(operation, shape, dtype, "forward", forward, check, 4 * size)
        steps = {name: full(f, inputs) for name, f in both.items()}
        yield Case(operation, shape, dtype, "full", steps, check, 6 * size)
