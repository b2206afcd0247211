"""Precision of the RatioMixer's CUDA kernels: their rounding, emulated in PyTorch.

``python -m benchmarks.studies.precision_study [--json FILE]`` rounds operands of matrix products to bfloat16,
with sums in float32, as the kernels do. Further cases also round the residual sum of the forward pass, the
gradient stream of the backward pass, or both, after every layer. Errors are relative to the largest float64
value: the median over random networks. The kernels must stay within twice the error of PyTorch's bfloat16
autocast, which is measured too.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import torch
from torch import Tensor

from diffratio_fast import command, ops
from diffratio_fast.ops import reference_ratio
from diffratio_fast.ops.ratio import weight_shapes
from diffratio_fast.storage.writing import replace_file

CHANNELS, SIDE, PATCH, BATCH = 3, 32, 2, 4
VARIANTS = {
    "kernels: both streams float32": (False, False),
    "residual sum bfloat16": (True, False),
    "gradient stream bfloat16": (False, True),
    "both bfloat16": (True, True),
}


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def product(a: Tensor, b: Tensor) -> Tensor:
    """bfloat16 operands, float32 sums."""
    return rounded(a) @ rounded(b)


def emulated(
    weights: list[Tensor], x: Tensor, sigma: Tensor, e: Tensor, residual: bool, stream: bool
) -> tuple[Tensor, Tensor]:
    """Log ratio [B] and its gradient in x [B, ...], rounded like csrc/cuda/ratio/mixer_kernel.cuh."""
    patch, position, mix, mix_bias, up, down, head = weights
    depth, hidden = up.shape[:2]
    width = patch.shape[0]
    c_in = (sigma**2 + 0.25).rsqrt()[:, None, None]
    z = reference_ratio.patches(x, PATCH) * c_in
    h = product(z, patch.T) + position + e[:, None, :width]
    kept = []
    for i in range(depth):
        m = h + product(mix[i], h) + mix_bias[i][:, None]
        bias = e[:, None, width + i * hidden : width + (i + 1) * hidden]
        u = product(m, up[i].T) + bias
        kept.append(u)
        h = 0.7 * (m + product(torch.nn.functional.silu(u), down[i].T))
        if residual:
            h = rounded(h)
    value = (head * h).sum((1, 2))
    g = (0.7 * head).expand(len(x), -1, -1)
    for i in reversed(range(depth)):
        if stream:
            g = rounded(g)
        u = kept[i]
        s = torch.sigmoid(u)
        g = g + product(product(g, down[i]) * (s + u * s * (1 - s)), up[i])
        if stream:
            g = rounded(g)
        g = g + product(mix[i].T, g)
        if i > 0:
            g = 0.7 * g
    dz = product(g, patch) * c_in
    rows = SIDE // PATCH
    dx = dz.reshape(len(x), rows, rows, CHANNELS, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return value, dx.reshape(x.shape)


def by_autograd(weights: list[Tensor], x: Tensor, sigma: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = reference_ratio.log_ratio(weights, x, sigma, e)
    return value.detach(), torch.autograd.grad(value.sum(), x)[0]


def errors(width: int, depth: int, seed: int) -> dict[str, list[float]]:
    """Errors of (log ratio, gradient) by name, for one network."""
    torch.manual_seed(seed)
    tokens, hidden = (SIDE // PATCH) ** 2, 2 * width
    shapes = weight_shapes(tokens, width, depth, hidden, CHANNELS * PATCH**2)
    weights = [torch.randn(shape) / shape[-1] ** 0.5 for shape in shapes.values()]
    weights[-1] /= tokens**0.5
    rng, index = ops.make_rng(seed, 0), torch.arange(BATCH)
    sigma = torch.rand(BATCH) + 0.1
    x = ops.add_noise(torch.randn(BATCH, CHANNELS, SIDE, SIDE), sigma, rng, index, ops.Purpose.NOISE_FAKE)
    e = 0.5 * torch.randn(BATCH, width + depth * hidden)
    exact = by_autograd([w.double() for w in weights], x.double(), sigma.double(), e.double())
    with torch.autocast("cpu", torch.bfloat16):
        found = {"PyTorch, bfloat16 autocast": by_autograd(weights, x, sigma, e)}
    for name, (residual, stream) in VARIANTS.items():
        found[name] = emulated(weights, x, sigma, e, residual, stream)
    return {
        name: [float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True)]
        for name, got in found.items()
    }


def main(argv: list[str]) -> None:
    parser = command.Parser(prog="python -m benchmarks.studies.precision_study", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--networks", type=int, default=15, help="number of random networks per size")
    options = parser.parse_args(argv)
    rows = []
    print("| layers | rounding | log ratio | gradient |\n|---|---|---|---|")
    for depth in (2, 4, 8):
        drawn = [errors(128, depth, seed) for seed in range(options.networks)]
        for name in drawn[0]:
            median = [statistics.median(found[name][i] for found in drawn) for i in range(2)]
            rows.append({"depth": depth, "rounding": name, "log_ratio": median[0], "gradient": median[1]})
            print(f"| {depth} | {name} | {median[0]:.1e} | {median[1]:.1e} |", flush=True)
    if options.json is not None:
        replace_file(options.json, json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    command.run(main)
