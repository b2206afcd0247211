"""The ratio operations compared with plain PyTorch: noise, network, autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from benchmarks.harness import Case, Settings
from diffratio_fast import ops
from diffratio_fast.ops import reference_ratio
from diffratio_fast.ops.ratio import forward_flops, weight_shapes

# channels, side, patch, width, blocks, batch
SIZES = {
    "cpu": {
        "digits": (1, 8, 2, 64, 2, 128),
        "CIFAR-10, C=64": (3, 32, 2, 64, 4, 32),
        "CIFAR-10, C=128": (3, 32, 2, 128, 4, 32),
    },
    "cuda": {
        "CIFAR-10, C=64": (3, 32, 2, 64, 4, 512),
        "CIFAR-10, C=128": (3, 32, 2, 128, 4, 512),
        "latents, C=128": (4, 64, 4, 128, 4, 512),
    },
}
EXPANSION = 2


def eager_log_ratio(weights: list[Tensor], x: Tensor, sigma: Tensor, e: Tensor) -> Tensor:
    """The log ratio in float32; on CUDA with matrix products in bfloat16, like the kernels."""
    with torch.autocast("cuda", torch.bfloat16, enabled=x.device.type == "cuda"):
        return reference_ratio.log_ratio(weights, x, sigma, e)


def with_noise(x: Tensor, sigma: Tensor) -> Tensor:
    return x + sigma.view(-1, 1, 1, 1) * torch.randn_like(x)


class Problem:
    """Weights, images and conditioning of one size, and the three operations of both implementations."""

    def __init__(self, device: torch.device, size: tuple[int, ...]) -> None:
        channels, side, patch, width, depth, batch = size
        tokens, hidden = (side // patch) ** 2, EXPANSION * width
        shapes = weight_shapes(tokens, width, depth, hidden, channels * patch**2)
        torch.manual_seed(0)
        self.weights = [
            (torch.randn(shape, device=device) / shape[-1] ** 0.5).requires_grad_()
            for shape in shapes.values()
        ]
        with torch.no_grad():
            self.weights[-1] *= tokens**-0.5  # log ratios of order one
        self.constants = [weight.detach() for weight in self.weights]
        self.real, self.fake = torch.randn(2, batch, channels, side, side, device=device).unbind()
        self.sigma = torch.rand(batch, 1, device=device) + 0.1
        self.weight = self.sigma**2
        self.conditioning = torch.randn(batch, 1, width + depth * hidden, device=device)
        self.rng, self.index = ops.make_rng(1, 2, device), torch.arange(batch, device=device)
        self.batch = batch
        self.flops = batch * forward_flops([weight.shape for weight in self.weights])
        self.bytes = float(self.fake.nbytes)

    def log_ratio(self, function: Callable[..., Tensor]) -> Tensor:
        with torch.no_grad():
            return function(self.constants, self.fake, self.sigma[:, 0], self.conditioning[:, 0])

    def fused_score(self) -> Any:
        return ops.score_difference(
            self.constants, self.fake, self.sigma, self.conditioning, self.rng, self.index,
            weight=self.weight, divergence="jensen_shannon",
        )  # fmt: skip

    def composed_score(self, function: Callable[..., Tensor]) -> Tensor:
        noised = with_noise(self.fake, self.sigma[:, 0]).requires_grad_()
        value = function(self.constants, noised, self.sigma[:, 0], self.conditioning[:, 0])
        (slope,) = torch.autograd.grad(value.sum(), noised)
        factor = -self.weight[:, 0] * torch.sigmoid(value.detach())
        return slope * factor.view(-1, 1, 1, 1)

    def fused_loss(self) -> Any:
        e = self.conditioning[:, 0]
        return ops.ratio_loss(
            self.weights, self.real, self.fake, self.sigma[:, 0], e, e, self.rng, self.index
        )

    def composed_loss(self, function: Callable[..., Tensor]) -> Any:
        sigma, e = self.sigma[:, 0], self.conditioning[:, 0].detach().requires_grad_()
        noised = torch.cat((with_noise(self.real, sigma), with_noise(self.fake, sigma)))
        value = function(self.weights, noised, torch.cat((sigma, sigma)), torch.cat((e, e)))
        loss = softplus(-value[: self.batch]).mean() + softplus(value[self.batch :]).mean()
        return loss, torch.autograd.grad(loss, [*self.weights, e])

    def check(self) -> None:
        """Compare the fused operations with the float64 reference on a few samples."""
        n = 2
        double = [weight.double() for weight in self.constants]
        fake, sigma, e = self.fake[:n], self.sigma[:n], self.conditioning[:n]
        weight, index, divergence = self.weight[:n], self.index[:n], "jensen_shannon"
        got = ops.score_difference(
            self.constants, fake, sigma, e, self.rng, index, weight=weight, divergence=divergence
        )
        exact = reference_ratio.score_difference(
            double, fake.double(), sigma.double(), e.double(), self.rng, index,
            weight=weight.double(), divergence=divergence,
        )  # fmt: skip
        for a, b in zip(got[:2], exact[:2], strict=True):
            error = float((a - b).norm() / b.norm())
            allowed = 2e-4 if fake.device.type == "cpu" else 3e-2  # tests/gpu is stricter
            assert error < allowed, f"score_difference differs from its reference by {error:.1e}"


def cases(settings: Settings) -> Iterator[Case]:
    for name, size in SIZES[settings.device.type].items():
        torch._dynamo.reset()
        yield from cases_of(Problem(settings.device, size), name, size)


def cases_of(p: Problem, name: str, size: tuple[int, ...]) -> Iterator[Case]:
    channels, side, _, width, depth, batch = size
    number_type = "float32" if p.fake.device.type == "cpu" else "bfloat16"  # of the matrix products
    shape = f"{name}: B={batch}, {channels}x{side}x{side}, C={width}, L={depth}"
    compiled = torch.compile(eager_log_ratio, dynamic=False)
    others = {"eager": eager_log_ratio, "compile": compiled}
    fused: dict[str, Callable[[int], Any]] = {"fused": lambda i: p.log_ratio(ops.log_ratio)}
    yield Case(
        "log_ratio", shape, number_type, "forward",
        fused | {key: lambda i, f=f: p.log_ratio(f) for key, f in others.items()},
        p.check, p.bytes, p.flops,
    )  # fmt: skip
    fused = {"fused": lambda i: p.fused_score()}
    yield Case(
        "score_difference", shape, number_type, "full",
        fused | {key: lambda i, f=f: p.composed_score(f) for key, f in others.items()},
        p.check, 2 * p.bytes, 2 * p.flops,
    )  # fmt: skip
    fused = {"fused": lambda i: p.fused_loss()}
    yield Case(
        "ratio_loss", shape, number_type, "full",
        fused | {key: lambda i, f=f: p.composed_loss(f) for key, f in others.items()},
        p.check, 2 * p.bytes, 6 * p.flops,
    )  # fmt: skip
