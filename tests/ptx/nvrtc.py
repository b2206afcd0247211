"""Kernels through NVRTC, without a GPU, and executed: as cupy compiles them on a machine without nvcc."""

from __future__ import annotations

import ctypes as C
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ptx.build import ROOT, find_toolkit
from ptx.simulator import Simulator

from diffratio_fast.ops import run_time
from diffratio_fast.ops.run_time import CODES, AddNoise, Words, include_directories

ARCHITECTURES = ("80", "90", "120")
SHAPES = ("64, 16", "64, 32", "128, 16", "128, 32", "256, 16", "256, 16, 2")
"""Shape<width, rows[, parts]> of csrc/cuda/ratio/mixer_sample.cuh."""
PASSES = ("forward", "image", "weights")
RATIO_SOURCE = """
#include "cuda/ratio/mixer_gradients.cuh"
#include "cuda/ratio/mixer_pack.cuh"
"""
RATIO_KERNELS = [
    *(f"diffratio::cuda::mixer_kernel<diffratio::cuda::Shape<{s}>, diffratio::cuda::Pass::{p}>"
      for s in SHAPES for p in PASSES),
    *(f"diffratio::cuda::ratio_loss_kernel<diffratio::cuda::Shape<{s}>>" for s in SHAPES if s < "2"),
    *(f"diffratio::cuda::{name}" for name in ("gradient_kernel", "finish_kernel", "pack_kernel")),
]  # fmt: skip
BYTES = {code: dtype.itemsize for dtype, code in CODES.items()}


def find_library() -> Path | None:
    """libnvrtc of the wheel or of the toolkit."""
    places = [Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/lib/libnvrtc.so.*")]
    toolkit = find_toolkit()
    if toolkit is not None:
        places.append(toolkit.include.parent.glob("lib*/libnvrtc.so.*"))
    return next((path for found in places for path in found if "builtins" not in path.name), None)


class CompilationFailed(Exception):
    """NVRTC's log."""


def compile_ptx(source: str, kernels: Sequence[str], architecture: str) -> tuple[str, dict[str, str]]:
    """PTX of the source for compute_<architecture>, and the mangled name of each kernel."""
    library = find_library()
    toolkit = find_toolkit()
    includes = [path for path in (*include_directories(), toolkit and toolkit.include) if path]
    if library is None or not includes:
        raise CompilationFailed("NVRTC or CUDA's headers are not here (pip install nvidia-cuda-nvrtc)")
    nvrtc, program, size = C.CDLL(str(library)), C.c_void_p(), C.c_size_t()
    nvrtc.nvrtcCreateProgram(C.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    for kernel in kernels:
        nvrtc.nvrtcAddNameExpression(program, kernel.encode())
    flags = [*run_time.FLAGS, "-lineinfo", f"-arch=compute_{architecture}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-I{path}" for path in includes]
    status = nvrtc.nvrtcCompileProgram(
        program, len(flags), (C.c_char_p * len(flags))(*map(str.encode, flags))
    )
    nvrtc.nvrtcGetProgramLogSize(program, C.byref(size))
    log = C.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    if status:
        raise CompilationFailed(log.value.decode())
    names = {}
    for kernel in kernels:
        lowered = C.c_char_p()
        nvrtc.nvrtcGetLoweredName(program, kernel.encode(), C.byref(lowered))
        names[kernel] = (lowered.value or b"").decode()
    nvrtc.nvrtcGetPTXSize(program, C.byref(size))
    ptx = C.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(C.byref(program))
    return ptx.value.decode(), names


class SimulatedLauncher:
    """``run_time.Launcher`` on the simulator: kernels can access only the memory of the call."""

    def __init__(self, simulator: Simulator, names: dict[str, str]) -> None:
        self.simulator, self.names = simulator, names

    def __call__(self, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        library = self.simulator.library
        memory = self.memory(arguments[0])
        for address, size, name in memory:
            library.simulator_adopt(address, size, name.encode(), int(name != "out"))
        try:
            self.simulator.launch(self.names[kernel], blocks, threads, list(arguments))
            (out,) = [(address, size) for address, size, name in memory if name == "out"]
            assert library.simulator_count_invalid(*out) == 0, "a byte of the result was not written"
        finally:
            for address, _, _ in memory:
                library.simulator_release(address)

    @staticmethod
    def memory(a: Any) -> list[tuple[int, int, str]]:
        """(address, bytes, name) of the arrays of a call."""
        found = [(a.rng, 16, "rng"), (a.index, 8 * a.batch, "index")]
        if isinstance(a, Words):
            return [*found, (a.out, 8 * a.batch * a.count, "out")]
        assert isinstance(a, AddNoise)
        source, target = BYTES[a.in_type], BYTES[a.out_type]
        found.append((a.out, target * a.inputs * a.batch * a.size, "out"))
        column = 8 if a.in_type == 3 else 4
        found += [(a.x0[i], source * a.batch * a.size, f"x0 {i}") for i in range(a.inputs) if a.x0[i]]
        return found + [(p, column * a.batch, n) for p, n in ((a.sigma, "sigma"), (a.scale, "scale")) if p]


def load_ratio_kernels(simulator: Simulator, architecture: str) -> int:
    """Load the ratio kernels compiled by NVRTC in place of nvcc's; return their number."""
    ptx, names = compile_ptx(RATIO_SOURCE, RATIO_KERNELS, architecture)
    simulator.load(ptx, f"NVRTC (sm_{architecture})")
    return len(names)


def load_noise_kernels(simulator: Simulator, architecture: str) -> run_time.Noise:
    """The noise operations as at run time, on the simulator."""
    ptx, names = compile_ptx(run_time.SOURCE, run_time.KERNELS, architecture)
    simulator.load(ptx, f"NVRTC (sm_{architecture})")
    return run_time.Noise(SimulatedLauncher(simulator, names))
