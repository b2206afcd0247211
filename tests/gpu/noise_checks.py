"""Checks of the CUDA noise operations against the CPU. Plain functions that need only torch: pytest collects
them through test_noise_cuda.py, and ``python -m benchmarks.gpu_checks`` runs them without pytest.

``DEVICE`` may be set to the CPU: then all but ``CUDA_ONLY`` compare the CPU with itself, to test the checks.
"""

from __future__ import annotations

import itertools

import torch

from diffratio_fast import ops
from diffratio_fast.ops import compiled

DEVICE = torch.device("cuda")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def _same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a.cpu(), b.cpu(), rtol=0, atol=0, equal_nan=True)


def noise_arguments(batch: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """rng, index and sigma of a batch."""
    return ops.make_rng(7, 8).to(DEVICE), torch.arange(batch).to(DEVICE), torch.rand(batch).to(DEVICE)


def check_built() -> None:
    assert compiled.CUDA, "the module was built without CUDA: set DIFFRATIO_CUDA=1 and build again"


def check_words_and_normals() -> None:
    rng, index = ops.make_rng(-3, 2**40 + 7), torch.tensor([0, 5, 2**35 + 9, -1])
    for size in (0, 1, 3, 8, 64, 1001, 70000):
        _same(
            ops.random_words(rng.to(DEVICE), index.to(DEVICE), 3, size), ops.random_words(rng, index, 3, size)
        )
        _same(ops.normal(rng.to(DEVICE), index.to(DEVICE), (size,), 3), ops.normal(rng, index, (size,), 3))


def check_every_radius_word() -> None:
    """2^24 normals and more: nearly every value of the polynomials' arguments."""
    rng, index = ops.make_rng(1, 2), torch.arange(64)
    _same(ops.normal(rng.to(DEVICE), index.to(DEVICE), (1 << 19,), 0), ops.normal(rng, index, (1 << 19,), 0))


def check_add_noise() -> None:
    rng, index = ops.make_rng(7, 8), torch.arange(5) * 7
    sigma, scale = torch.rand(5) * 3, torch.rand(5)
    for size, offset in itertools.product((1, 7, 8, 20, 64, 3072, 4100), (0, 1)):
        for source, target in (*itertools.product(FLOATS, FLOATS), (torch.float64, torch.float64)):
            x = [torch.randn(5 * size + offset).mul(5).to(source)[offset:].view(5, size) for _ in range(2)]
            on_device = [
                torch.empty(5 * size + offset, dtype=source, device=DEVICE)[offset:] for _ in range(2)
            ]
            on_device = [d.view(5, size).copy_(v) for d, v in zip(on_device, x, strict=True)]
            got = ops.add_noise(
                tuple(on_device),
                sigma.to(DEVICE),
                rng.to(DEVICE),
                index.to(DEVICE),
                (3, 4),
                scale=scale.to(DEVICE),
                dtype=target,
            )
            _same(got, ops.add_noise(tuple(x), sigma, rng, index, (3, 4), scale=scale, dtype=target))


def check_nan_sigma_stays_in_its_sample() -> None:
    rng, index, x = ops.make_rng(7, 8).to(DEVICE), torch.arange(3).to(DEVICE), torch.randn(3, 100).to(DEVICE)
    sigma = torch.tensor([1.0, float("nan"), 2.0]).to(DEVICE)
    noised = ops.add_noise(x, sigma, rng, index, 3)
    assert noised[1].isnan().all() and not noised[[0, 2]].isnan().any()


def check_gradient() -> None:
    rng, index = ops.make_rng(7, 8).to(DEVICE), torch.arange(3).to(DEVICE)
    x = torch.randn(3, 100, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    scale, upstream = torch.rand(3).to(DEVICE), torch.randn(3, 100).to(DEVICE)
    noised = ops.add_noise(x, torch.rand(3).to(DEVICE), rng, index, 3, scale=scale, dtype=torch.float32)
    noised.backward(upstream)
    _same(x.grad, (upstream * scale[:, None]).bfloat16())


def check_determinism() -> None:
    rng, index, x = (
        ops.make_rng(7, 8).to(DEVICE),
        torch.arange(256).to(DEVICE),
        torch.randn(256, 4, 64, 64).to(DEVICE),
    )
    sigma = torch.rand(256).to(DEVICE)
    results = [ops.add_noise((x, x), sigma, rng, index, (3, 4)) for _ in range(3)]
    _same(results[0], results[1])
    _same(results[0], results[2])


def check_another_stream() -> None:
    rng, index, x = (
        ops.make_rng(7, 8).to(DEVICE),
        torch.arange(64).to(DEVICE),
        torch.randn(64, 4, 64, 64).to(DEVICE),
    )
    sigma = torch.rand(64).to(DEVICE)
    expected = ops.add_noise(x, sigma, rng, index, 3)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        shifted = x + 1  # ordered only if the launch uses this stream
        got = ops.add_noise(shifted - 1, sigma, rng, index, 3)
    torch.cuda.synchronize()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def check_graph_replay() -> None:
    """A captured graph reads the seed and step of its replay from ``rng``."""
    rng, index, x = ops.make_rng(7, 0).to(DEVICE), torch.arange(8).to(DEVICE), torch.randn(8, 300).to(DEVICE)
    sigma = torch.rand(8).to(DEVICE)
    ops.add_noise(x, sigma, rng, index, 3)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ops.add_noise(x, sigma, rng, index, 3)
    for step in (1, 2, 5):
        rng.copy_(ops.make_rng(7, step))
        graph.replay()
        torch.cuda.synchronize()
        _same(out, ops.add_noise(x.cpu(), sigma.cpu(), ops.make_rng(7, step), index.cpu(), 3))


def check_no_synchronization() -> None:
    rng, index, x = ops.make_rng(7, 8).to(DEVICE), torch.arange(8).to(DEVICE), torch.randn(8, 300).to(DEVICE)
    sigma = torch.rand(8).to(DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.add_noise(x, sigma, rng, index, 3)
        ops.normal(rng, index, (5,), 3)
        ops.random_words(rng, index, 3, 5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
CUDA_ONLY = (
    check_built,
    check_nan_sigma_stays_in_its_sample,
    check_another_stream,
    check_graph_replay,
    check_no_synchronization,
)
