"""CUDA kernels compiled at run time with NVRTC (through cupy), if the build found no CUDA compiler.

The sources are those that nvcc compiles ahead of time (``csrc/cuda``); the noise is bit-identical. cupy
caches compiled kernels on disk (``CUPY_CACHE_DIR``), so only the first call on a machine takes seconds. Only
the noise operations exist here; the other fused operations use the reference on a GPU.
``DIFFRATIO_RUN_TIME=0`` disables this module.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

CSRC = Path(__file__).resolve().parent.parent.parent / "csrc"
FLAGS = ("-std=c++20", "--fmad=false", "-default-device")
"""Flags of NVRTC; without contraction the noise is bit-identical to the CPU."""
CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
"""Codes of dtypes in csrc/common/types.h."""
C_TYPES = {
    torch.float32: "float",
    torch.bfloat16: "BFloat16",
    torch.float16: "Float16",
    torch.float64: "double",
}
THREADS, UNIT, MOST_BLOCKS = 256, 8, 65536
"""Constants of csrc/cuda/noise: threads per block, elements per thread, maximum blocks per launch."""
MOST_INPUTS = 8

WORDS = "diffratio::cuda::random_words_kernel"
NORMALS = "diffratio::cuda::add_noise_kernel<float, float, true>"


def noise_kernel(source: torch.dtype, target: torch.dtype) -> str:
    """The name of the kernel that reads images of one type and writes another."""

    def name(dtype: torch.dtype) -> str:
        return C_TYPES[dtype] if dtype in (torch.float32, torch.float64) else f"diffratio::{C_TYPES[dtype]}"

    return f"diffratio::cuda::add_noise_kernel<{name(source)}, {name(target)}, false>"


FLOATS = (torch.float32, torch.bfloat16, torch.float16)
KERNELS = [
    WORDS,
    NORMALS,
    *(noise_kernel(a, b) for a in FLOATS for b in FLOATS),
    noise_kernel(torch.float64, torch.float64),
]
SOURCE = '#include "cuda/noise/noise_kernel.cuh"\n'


class AddNoise(ctypes.Structure):
    """``AddNoise`` of csrc/common/noise.h."""

    _fields_ = [
        ("rng", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("size", ctypes.c_int64),
        ("inputs", ctypes.c_int),
        ("streams", ctypes.c_uint32 * MOST_INPUTS),
        ("x0", ctypes.c_void_p * MOST_INPUTS),
        ("sigma", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("in_type", ctypes.c_int),
        ("out_type", ctypes.c_int),
    ]
    held: tuple[Tensor, Tensor]


class Words(ctypes.Structure):
    """``Words`` of csrc/common/noise.h."""

    _fields_ = [
        ("rng", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("count", ctypes.c_int64),
        ("stream", ctypes.c_uint32),
        ("out", ctypes.c_void_p),
    ]


class Launcher(Protocol):
    """Launches a kernel of ``KERNELS`` on the current stream; arguments are ctypes values."""

    def __call__(self, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None: ...


def include_directories() -> list[Path]:
    """Directories that may have CUDA headers: of the toolkit, and of the packages that PyTorch installs."""
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    roots.append(Path("/usr/local/cuda"))
    spec = importlib.util.find_spec("nvidia")
    for place in spec.submodule_search_locations or () if spec is not None else ():
        roots += [*sorted(Path(place).glob("cu*")), Path(place) / "cuda_runtime"]
    return [root / "include" for root in roots if (root / "include" / "cuda_bf16.h").exists()]


@functools.cache
def unavailable() -> str:
    """Why kernels cannot be compiled at run time on this machine; "" if they can."""
    if os.environ.get("DIFFRATIO_RUN_TIME", "1") == "0":
        return "DIFFRATIO_RUN_TIME=0"
    if not torch.cuda.is_available():
        return "no CUDA device is visible"
    if importlib.util.find_spec("cupy") is None:
        return "cupy is not installed"
    if not (CSRC / "cuda" / "noise" / "noise_kernel.cuh").exists():
        return "the sources (csrc/cuda) are not beside the package"
    if not include_directories():
        return "CUDA's headers are not here (pip install nvidia-cuda-runtime)"
    return ""


class Cupy:
    """Kernels of one device; cupy compiles them at the first launch."""

    def __init__(self) -> None:
        self._modules: dict[int, Any] = {}

    def __call__(self, kernel: str, blocks: int, threads: int, arguments: Sequence[Any]) -> None:
        import cupy
        import numpy as np

        device = torch.cuda.current_device()
        with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
            if device not in self._modules:
                includes = [f"-I{path}" for path in (CSRC, *include_directories())]
                options = (*FLAGS, *includes)
                self._modules[device] = cupy.RawModule(
                    code=SOURCE, options=options, name_expressions=KERNELS, backend="nvrtc"
                )
            values = [np.frombuffer(bytes(argument), dtype=np.uint8) for argument in arguments]
            self._modules[device].get_function(kernel)((blocks,), (threads,), tuple(values))


def blocks_for(work: int) -> int:
    return min(-(-work // THREADS), MOST_BLOCKS)


def stream_word(purpose: int, substep: int, draw: int) -> int:
    """The stream word of csrc/common/philox.h for purpose, substep and draw."""
    return purpose << 24 | substep << 16 | draw


def is_aligned(address: int, size: int, dtype: torch.dtype) -> bool:
    """Whether all rows of ``size`` elements start at multiples of 16 bytes."""
    return address % 16 == 0 and size * dtype.itemsize % 16 == 0


class Noise:
    """The noise operations for CUDA tensors, through a launcher; arguments are those of the schemas."""

    def __init__(self, launch: Launcher) -> None:
        self.launch = launch

    def random_words(
        self, rng: Tensor, index: Tensor, purpose: int, count: int, substep: int, draw: int
    ) -> Tensor:
        rng, index = rng.contiguous(), index.contiguous()
        out = index.new_empty((len(index), count))
        word = stream_word(purpose, substep, draw)
        arguments = Words(rng.data_ptr(), index.data_ptr(), len(index), count, word, out.data_ptr())
        if out.numel():
            self.launch(WORDS, blocks_for(-(-count // 4) * len(index)), THREADS, [arguments])
        return out

    def normal(
        self, rng: Tensor, index: Tensor, shape: Sequence[int], purpose: int, substep: int, draw: int
    ) -> Tensor:
        out = torch.empty((len(index), *shape), dtype=torch.float32, device=index.device)
        a = self._arguments(rng, index, [purpose], substep, draw, out, len(index))
        if out.numel():
            self._launch(
                NORMALS, a, in_aligned=False, out_aligned=is_aligned(out.data_ptr(), a.size, out.dtype)
            )
        return out

    def add_noise(
        self, x0: Sequence[Tensor], sigma: Tensor, rng: Tensor, index: Tensor, purposes: Sequence[int],
        substep: int, draw: int, scale: Tensor | None, dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        batch, inputs = x0[0].shape[0], [x.contiguous() for x in x0]
        sigma, scale = sigma.contiguous(), None if scale is None else scale.contiguous()
        out = inputs[0].new_empty((batch * len(inputs), *inputs[0].shape[1:]), dtype=dtype)
        if not out.numel():
            return out
        a = self._arguments(rng, index, purposes, substep, draw, out, batch)
        source = inputs[0].dtype
        for i, x in enumerate(inputs):
            a.x0[i] = x.data_ptr()
        a.sigma, a.scale = sigma.data_ptr(), None if scale is None else scale.data_ptr()
        a.in_type, a.out_type = CODES[source], CODES[dtype]
        aligned = all(is_aligned(x.data_ptr(), a.size, source) for x in inputs)
        self._launch(noise_kernel(source, dtype), a, aligned, is_aligned(out.data_ptr(), a.size, dtype))
        return out

    @staticmethod
    def _arguments(
        rng: Tensor, index: Tensor, purposes: Sequence[int], substep: int, draw: int, out: Tensor, batch: int
    ) -> AddNoise:
        a = AddNoise(inputs=len(purposes), batch=batch, out=out.data_ptr())
        a.held = rng.contiguous(), index.contiguous()  # until the launch
        a.rng, a.index = (tensor.data_ptr() for tensor in a.held)
        a.size = out.numel() // max(batch * len(purposes), 1)
        for i, purpose in enumerate(purposes):
            a.streams[i] = stream_word(purpose, substep, draw)
        return a

    def _launch(self, kernel: str, a: AddNoise, in_aligned: bool, out_aligned: bool) -> None:
        blocks = blocks_for(-(-a.size // UNIT) * a.batch * a.inputs)
        flags = [ctypes.c_bool(in_aligned), ctypes.c_bool(out_aligned)]
        self.launch(kernel, blocks, THREADS, [a, *flags])


@functools.cache
def register() -> Callable[[], None] | None:
    """Register the operations of this module for CUDA tensors; ``compiled`` calls it once."""
    library, noise = torch.library.Library("diffratio", "IMPL"), Noise(Cupy())
    for name in ("random_words", "normal", "add_noise"):
        library.impl(name, getattr(noise, name), "CUDA")
    return library._destroy  # keeps the library
