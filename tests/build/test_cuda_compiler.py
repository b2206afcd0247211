"""The CUDA compiler's report on the kernels, and the CUDA fields of the built module."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support import ROOT

from diffratio_fast.ops import compiled


@pytest.mark.slow
def test_ptxas_report_is_within_the_limits():
    result = subprocess.run(
        [sys.executable, ROOT / ".ci" / "check_cuda"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within their limits" in result.stdout or "no nvcc" in result.stdout


NVRTC_SOURCE = b"""
#include "csrc/cuda/ratio/mixer_gradients.cuh"
#include "csrc/cuda/ratio/mixer_pack.cuh"
#include "csrc/cuda/noise/noise_kernel.cuh"
namespace diffratio::cuda {
using Small = Shape<64, 16>;
template __global__ void mixer_kernel<Small, Pass::forward>(const MixerCall);
template __global__ void mixer_kernel<Small, Pass::image>(const MixerCall);
template __global__ void ratio_loss_kernel<Small>(const MixerCall, const GradientCall, int, uint32_t*);
template __global__ void add_noise_kernel<float, BFloat16, false>(const AddNoise, bool, bool);
}
"""


def test_the_kernels_compile_at_run_time_too():
    """With NVRTC, which has no host compiler and no standard library (pip install nvidia-cuda-nvrtc)."""
    library = next(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/lib/libnvrtc.so.*"), None)
    headers = Path("/usr/local/cuda/include")
    if library is None or not (headers / "cuda_bf16.h").exists():
        pytest.skip("NVRTC or CUDA's headers are not here")
    nvrtc, program, size = ctypes.CDLL(str(library)), ctypes.c_void_p(), ctypes.c_size_t()
    assert nvrtc.nvrtcCreateProgram(ctypes.byref(program), NVRTC_SOURCE, b"k.cu", 0, None, None) == 0
    flags = ["-std=c++20", "-arch=sm_90a", f"-I{ROOT}", f"-I{headers}", "--fmad=false", "-default-device"]
    status = nvrtc.nvrtcCompileProgram(
        program, len(flags), (ctypes.c_char_p * len(flags))(*map(str.encode, flags))
    )
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def test_no_module_is_claimed_to_have_cuda_without_architectures():
    info = compiled.build_info()
    if info["built"]:
        assert bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
