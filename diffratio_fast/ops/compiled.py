"""Load the compiled module ``diffratio_fast._C``, or report in one line why it is not used."""

from __future__ import annotations

import functools
import importlib.util
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import torch

from diffratio_fast.ops import run_time

# Increment this and interface_version in csrc/bindings.h whenever an operation's schema changes. A module
# that was built from older sources is then detected.
INTERFACE = 5

_PACKAGE = Path(__file__).resolve().parent.parent
_INFO = _PACKAGE / "_build_info.json"
REBUILD = "run `pip install -e .` (or `python setup.py build_ext --inplace`) in the source directory"


class _Unusable(Exception):
    """The compiled module cannot be used; the message gives the reason."""


def _load() -> Any:
    """Load the compiled module; raise ``_Unusable`` if it cannot be used.

    ``_build_info.json`` is compared first: loading a module that was built for another torch can crash the
    process.
    """
    try:
        info = json.loads(_INFO.read_text())
        built, reason = bool(info["built"]), str(info.get("reason", "it was not built"))
    except FileNotFoundError:
        built, reason = False, "it was not built"
    except (OSError, ValueError, KeyError, TypeError):
        raise _Unusable(f"{_INFO.name} is damaged") from None
    if not built:
        raise _Unusable(reason)
    if info.get("torch_version") != torch.__version__:
        built_for = info.get("torch_version")
        raise _Unusable(f"it was built for torch {built_for}, this is torch {torch.__version__}")
    # Load by path: by name, Python may find an editable installation of another copy of the package.
    path = _PACKAGE / ("_C" + sysconfig.get_config_var("EXT_SUFFIX"))
    try:
        complete = path.stat().st_size == info.get("bytes")
    except OSError:
        complete = False
    if not complete:  # loading a truncated library kills the process
        raise _Unusable(f"{path.name} is missing or damaged")
    spec = importlib.util.spec_from_file_location("diffratio_fast._C", path)
    assert spec is not None and spec.loader is not None
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        raise _Unusable(f"it cannot be loaded: {str(error).splitlines()[0]}") from None
    sys.modules[spec.name] = module
    if module.build_info()["interface"] != INTERFACE:
        raise _Unusable("it was built from other sources")
    return module


@functools.cache
def _state() -> tuple[Any, str]:
    try:
        return _load(), ""
    except _Unusable as reason:
        print(
            f"diffratio_fast: the compiled operations are not used ({reason}); the slower reference "
            f"operations run instead. To build them, {REBUILD}.",
            file=sys.stderr,
        )
        return None, str(reason)


module: Any = _state()[0]  # None: references only
CUDA: bool = module is not None and bool(module.build_info()["cuda_archs"])


def compiled_for(tensor: torch.Tensor) -> bool:
    """Whether the noise operations have compiled code (built or run-time) for the tensor's device."""
    if module is None:
        return False
    kind = tensor.device.type
    return kind == "cpu" or (kind == "cuda" and (CUDA or cuda_kernels() == "run time"))


@torch.compiler.assume_constant_result
def cuda_kernels() -> str:
    """How CUDA kernels are compiled on this machine: "ahead of time", "run time" or "reference" (none)."""
    return _decide_cuda_kernels()


@functools.cache
def _decide_cuda_kernels() -> str:
    if CUDA:
        return "ahead of time"
    reason = run_time.unavailable()
    if module is not None and not reason:
        run_time.register()
        print(
            "diffratio_fast: built without CUDA: the noise operations are compiled at run time (NVRTC "
            f"through cupy), the others run as reference on the GPU. With a CUDA compiler (nvcc), {REBUILD}.",
            file=sys.stderr,
        )
        return "run time"
    if module is not None and torch.cuda.is_available():
        print(
            "diffratio_fast: built without CUDA: the slower reference operations run on the GPU "
            f"({reason}). With a CUDA compiler (nvcc) and DIFFRATIO_CUDA=1, {REBUILD}.",
            file=sys.stderr,
        )
    return "reference"


def build_info() -> dict[str, Any]:
    """See :func:`diffratio_fast.build_info`."""
    if module is None:
        return {"built": False, "reason": _state()[1]}
    return {"built": True, **module.build_info(), "cuda_kernels": cuda_kernels()}
