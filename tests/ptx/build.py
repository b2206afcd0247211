"""Builds the simulator: CUDA sources to PTX by nvcc, linked with an interpreter instead of a driver.

nvcc is the installed one, or that of the ``nvidia-cuda-nvcc`` wheel. Objects are kept, and compiled again if
a source they may depend on has changed.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import probe  # noqa: E402

ARCHITECTURES = ("80", "90a")
HOST = [
    "-std=c++20",
    "-O2",
    "-march=native",
    "-ffp-contract=off",
    "-fno-strict-aliasing",
    "-fPIC",
    "-Wall",
    "-Wextra",
]
MARKS = ["-DDR_SHARED_MARKS"]
"""Test builds mark the ends of arrays in shared memory for the simulator (csrc/cuda/ptx.cuh)."""
# -lineinfo: reports and mutations name lines of the source. --no-compress: the runtime reads the PTX.
DEVICE = ["-std=c++20", "-O3", "--fmad=false", "-lineinfo", "--no-compress", "-Xcompiler", "-fPIC"]
HEADERS = {".h", ".cuh"}
Job = tuple[Path, Path, float, list[object]]
"""A source, its object, when the headers were last changed, and the compiler with its options."""


@dataclass(frozen=True)
class Toolkit:
    nvcc: Path
    include: Path


def find_toolkit() -> Toolkit | None:
    """nvcc with the headers of its runtime, or None."""
    wheels = Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin/nvcc")
    found = [Path(nvcc) for nvcc in (probe.find_nvcc(), shutil.which("nvcc")) if nvcc] + list(wheels)
    for nvcc in found:
        dryrun = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        lines = [line for line in dryrun.stderr.splitlines() if line.startswith("#$ _THERE_=")]
        root = Path(lines[0].partition("=")[2]).parent if lines else nvcc.resolve().parent.parent
        for include in (root / "include", *root.glob("targets/*/include")):
            if (include / "cuda_runtime_api.h").exists():
                return Toolkit(nvcc, include)
    return None


def newest(folders: list[Path]) -> float:
    """When a header below the folders was last changed."""
    files = (path for folder in folders for path in folder.rglob("*") if path.suffix in HEADERS)
    return max((path.stat().st_mtime for path in files), default=0.0)


def run(command: list[object]) -> None:
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{result.stdout}{result.stderr}")


def device_sources(small: bool) -> list[Path]:
    """The kernels of the tests, with or without the project's."""
    own = [] if small else sorted((ROOT / "csrc/cuda").rglob("*.cu"))
    return [*own, *sorted((HERE / "kernels").glob("*.cu"))]


def build(folder: Path, architecture: str = "80", *, marks: bool = False, small: bool = False) -> Path:
    """The simulator's library for sm_80 or sm_90a, in ``folder``.

    ``marks``: kernels mark their arrays in shared memory. ``small``: only the kernels of the tests.
    """
    toolkit, compiler = find_toolkit(), probe.find_compiler()
    if toolkit is None or compiler is None:
        raise RuntimeError("the simulator needs nvcc (pip install nvidia-cuda-nvcc) and a C++ compiler")
    folder.mkdir(parents=True, exist_ok=True)
    variant = architecture + ("-marks" if marks else "")
    device = [*DEVICE, *(MARKS if marks else []), f"-I{ROOT}"]
    target = f"arch=compute_{architecture},code=compute_{architecture}"
    kernels = newest([ROOT / "csrc", HERE / "kernels", ROOT / "tests" / "simt" / "kernels"])
    simulator = newest([HERE / "interpreter", HERE / "runtime"])
    jobs: list[Job] = [
        (source, folder / f"{source.stem}-{variant}.o", kernels, [toolkit.nvcc, *device, "-gencode", target])
        for source in device_sources(small)
    ]
    host: list[object] = [compiler, *HOST, f"-I{HERE}", f"-I{ROOT / 'csrc'}", "-isystem", toolkit.include]
    for source in [*sorted((HERE / "interpreter").glob("*.cpp")), *sorted((HERE / "runtime").glob("*.cpp"))]:
        if source.stem == "launchers":
            if not small:
                jobs.append((source, folder / f"{source.stem}.o", max(kernels, simulator), host))
        else:
            jobs.append((source, folder / f"{source.stem}.o", simulator, host))

    def compile_one(job: Job) -> None:
        source, output, changed, command = job
        if not output.exists() or output.stat().st_mtime < max(changed, source.stat().st_mtime):
            run([*command, "-c", source, "-o", output])

    with (folder / ".lock").open("w") as lock:  # tests in several processes build in one folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        return _link(
            compiler, jobs, compile_one, folder / f"libsimulator-{variant}{'-small' if small else ''}.so"
        )


def _link(compiler: str | Path, jobs: list[Job], compile_one: Callable[[Job], None], library: Path) -> Path:
    """Run the jobs that are out of date, and link their objects."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, jobs))
    objects = [output for _, output, _, _ in jobs]
    if not library.exists() or library.stat().st_mtime < max(o.stat().st_mtime for o in objects):
        run([compiler, "-shared", "-Wl,--no-undefined", "-o", library, *objects])
    return library
