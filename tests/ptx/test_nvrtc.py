"""Kernels compiled at run time: NVRTC without a GPU, and its output executed on the CPU."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from ptx import nvrtc
from ptx.build import build, find_toolkit
from ptx.simulator import Simulator

from diffratio_fast import ops
from diffratio_fast.ops import compiled, run_time

ROOT = Path(__file__).resolve().parent.parent.parent
needs_nvrtc = pytest.mark.skipif(
    nvrtc.find_library() is None or find_toolkit() is None, reason="NVRTC or CUDA's headers are not here"
)


@pytest.fixture(scope="module")
def noise() -> run_time.Noise:
    """The noise operations as cupy compiles them, on the simulator."""
    return nvrtc.load_noise_kernels(Simulator(build(ROOT / "build" / "ptx", marks=True, small=True)), "80")


@pytest.mark.slow
@needs_nvrtc
@pytest.mark.parametrize("architecture", nvrtc.ARCHITECTURES)
def test_every_kernel_compiles_without_a_gpu(architecture: str) -> None:
    for source, kernels in ((run_time.SOURCE, run_time.KERNELS), (nvrtc.RATIO_SOURCE, nvrtc.RATIO_KERNELS)):
        ptx, names = nvrtc.compile_ptx(source, kernels, architecture)
        assert f".target sm_{architecture}" in ptx
        assert all(f".entry {name}(" in ptx for name in names.values())


@pytest.mark.slow
@needs_nvrtc
def test_noise_at_run_time_has_the_bits_of_the_cpu(noise: run_time.Noise) -> None:
    rng, index = ops.make_rng(-3, 2**40 + 7), torch.tensor([0, 5, 2**35 + 9])
    for size in (1, 7, 64, 1001):
        found = noise.random_words(rng, index, 3, size, 2, 9)
        assert torch.equal(found, ops.random_words(rng, index, 3, size, substep=2, draw=9))
        assert torch.equal(noise.normal(rng, index, (size,), 3, 0, 0), ops.normal(rng, index, (size,), 3))
    kinds = [*itertools.product(run_time.FLOATS, run_time.FLOATS), (torch.float64, torch.float64)]
    for (source, target), size in itertools.product(kinds, (7, 64)):
        x = [torch.randn(3, size).to(source) for _ in range(2)]
        wide = torch.float64 if source == torch.float64 else torch.float32
        sigma, scale = torch.rand(3).to(wide), torch.rand(3).to(wide)
        found = noise.add_noise(x, sigma, rng, index, (3, 4), 0, 0, scale, target)
        expected = ops.add_noise(tuple(x), sigma, rng, index, (3, 4), scale=scale, dtype=target)
        assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.slow
@needs_nvrtc
def test_noise_at_run_time_takes_what_is_not_contiguous(noise: run_time.Noise) -> None:
    rng, index = ops.make_rng(1, 2), torch.arange(6)[::2]
    x = torch.randn(8, 3).T
    found = noise.add_noise([x], torch.rand(6)[::2], rng, index, (3,), 0, 0, None, torch.float32)
    torch.manual_seed(0)
    x = torch.randn(8, 3).T
    expected = ops.add_noise(x, torch.rand(6)[::2], rng, index, 3)
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"visible": False}, "no CUDA device is visible"),
        ({"off": True}, "DIFFRATIO_RUN_TIME=0"),
        ({"cupy": False}, "cupy is not installed"),
        ({"sources": False}, "the sources (csrc/cuda) are not beside the package"),
    ],
)
def test_why_kernels_are_not_compiled_at_run_time(
    change: dict[str, bool], reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = {"visible": True, "off": False, "cupy": True, "sources": True} | change
    monkeypatch.setenv("DIFFRATIO_RUN_TIME", "0" if chosen["off"] else "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: chosen["visible"])
    monkeypatch.setattr(run_time.importlib.util, "find_spec", lambda name: chosen["cupy"] or None)
    if not chosen["sources"]:
        monkeypatch.setattr(run_time, "CSRC", tmp_path)
    assert run_time.unavailable.__wrapped__() == reason


def test_one_line_reports_which_kernels_are_in_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    registered: list[bool] = []
    monkeypatch.setattr(compiled, "CUDA", False)
    monkeypatch.setattr(compiled, "module", object())
    monkeypatch.setattr(run_time, "register", lambda: registered.append(True))
    monkeypatch.setattr(run_time, "unavailable", lambda: "")
    assert compiled._decide_cuda_kernels.__wrapped__() == "run time" and registered == [True]
    assert "compiled at run time (NVRTC through cupy)" in capsys.readouterr().err
    monkeypatch.setattr(run_time, "unavailable", lambda: "cupy is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert compiled._decide_cuda_kernels.__wrapped__() == "reference"
    assert "(cupy is not installed)" in capsys.readouterr().err
    monkeypatch.setattr(compiled, "CUDA", True)
    assert compiled._decide_cuda_kernels.__wrapped__() == "ahead of time"
    assert capsys.readouterr().err == ""
