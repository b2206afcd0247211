"""What there is to build with: torch, compilers, CMake and Ninja, CUDA. Needs only the standard library."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

MINIMUM = "2.11"


@dataclass(frozen=True)
class Torch:
    path: str  # of the package
    version: str
    cxx11_abi: int

    @property
    def too_old(self) -> bool:
        return _numbers(self.version) < _numbers(MINIMUM)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.split("+")[0])[:2])


# Run in a fresh interpreter. The script's own directory must not provide `torch`, hence -P's effect by hand.
_PROBE = """
import json, sys
sys.path[:] = [p for p in sys.path if p]
import torch
print("@" + json.dumps([torch.__path__[0], torch.__version__, int(torch._C._GLIBCXX_USE_CXX11_ABI)]))
"""


def find_torch() -> Torch | None:
    """The torch of the environment that invoked the build, else that of the build's own environment."""
    outside = dict(os.environ)
    for name in ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME"):  # pip isolates with these
        outside.pop(name, None)
    environments = [outside, dict(os.environ)] if _isolated() else [dict(os.environ)]
    for environment in environments:
        result = subprocess.run(
            [sys.executable, "-c", _PROBE], env=environment, cwd=os.sep, capture_output=True, text=True
        )
        for line in result.stdout.splitlines():
            if line.startswith("@"):
                return Torch(*json.loads(line[1:]))
    return None


def _isolated() -> bool:
    return any("pip-build-env" in p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep))


def find_tool(name: str) -> str | None:
    """CMake or Ninja: an installed Python package of that name, else the one on PATH."""
    try:
        module = __import__(name)
        for directory in (getattr(module, "CMAKE_BIN_DIR", None), getattr(module, "BIN_DIR", None)):
            if directory and (found := shutil.which(name, path=directory)):
                return found
    except ImportError:
        pass
    beside = shutil.which(name, path=str(Path(sys.executable).parent))
    return beside or shutil.which(name)


def find_compiler() -> str | None:
    """The C++ compiler that CMake will choose."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shutil.which(chosen.split()[0])
    return next((found for name in ("c++", "g++", "clang++") if (found := shutil.which(name))), None)


def find_nvcc() -> str | None:
    if os.environ.get("CUDACXX"):
        return shutil.which(os.environ["CUDACXX"])
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in homes:
        if home and (found := shutil.which("nvcc", path=os.path.join(home, "bin"))):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def nvcc_version(nvcc: str) -> tuple[int, ...]:
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    except OSError:
        return ()
    match = re.search(r"release (\d+)\.(\d+)", text)
    return tuple(map(int, match.groups())) if match else ()


def cuda_architectures() -> str:
    """CMake's list, from DIFFRATIO_CUDA_ARCHS, TORCH_CUDA_ARCH_LIST, the visible GPUs, or the default."""
    named = os.environ.get("DIFFRATIO_CUDA_ARCHS") or os.environ.get("TORCH_CUDA_ARCH_LIST")
    if not named:
        try:
            query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
            result = subprocess.run(query, capture_output=True, text=True, timeout=30)
            named = " ".join(sorted(set(re.findall(r"^\d+\.\d+$", result.stdout, re.MULTILINE))))
        except (OSError, subprocess.TimeoutExpired):
            pass
    # "80" is the machine code and PTX: newer GPUs compile that when the module is loaded.
    return ";".join(map(_architecture, re.split(r"[\s;,]+", named.strip()))) if named else "80;90a-real"


def _architecture(name: str) -> str:
    """From "8.0", "9.0+PTX", "80" ... to CMake's spelling; 9.0 means 9.0a, whose instructions we use."""
    match = re.fullmatch(r"(\d+)\.?(\d)(a|f)?(\+PTX|-real|-virtual)?", name)
    if not match:
        raise ValueError(f"unknown CUDA architecture {name!r}; a good list is '8.0;9.0a'")
    major, minor, letter, suffix = match.groups()
    number = major + minor + (letter or ("a" if major + minor == "90" else ""))
    return number + {"+PTX": "", None: "-real"}.get(suffix, suffix or "")
