"""A thin driver: setuptools installs the package, CMake builds the extension (CMakeLists.txt).

Environment: DIFFRATIO_CUDA=auto|1|0 (auto: CUDA where a compiler is found; 1: a missing one is an error),
DIFFRATIO_CUDA_ARCHS (such as "8.0;9.0a", else TORCH_CUDA_ARCH_LIST, else the visible GPU's), CXX, CUDACXX,
CUDA_HOME, MAX_JOBS.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_backend"))
import probe  # noqa: E402


class CannotBuild(Exception):
    """Something that a build needs is not there; the package then runs on its reference operations."""


def say(line: str) -> None:
    # pip shows a build's output only with -v, or when it fails; a terminal sees it at once.
    print(f"diffratio_fast: {line}", file=sys.stderr, flush=True)


def cuda_options() -> list[str] | None:
    """CMake's options for CUDA, or None for a build without."""
    wish = os.environ.get("DIFFRATIO_CUDA", "auto").lower()
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"error: DIFFRATIO_CUDA is auto, 1 or 0, not {wish!r}")
    if wish == "0":
        return None
    nvcc = probe.find_nvcc()
    problem = ""
    if nvcc is None:
        problem = "no CUDA compiler (nvcc) was found: put it on PATH or set CUDA_HOME"
    elif probe.nvcc_version(nvcc) < (12, 0):
        problem = f"{nvcc} is older than CUDA 12.0"
    if problem and wish == "1":
        raise SystemExit(f"error: DIFFRATIO_CUDA=1, but {problem}")
    if problem:
        say(f"{problem}; building for the CPU only")
        return None
    try:
        architectures = probe.cuda_architectures()
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    return [f"-DCMAKE_CUDA_COMPILER={nvcc}", f"-DCMAKE_CUDA_ARCHITECTURES={architectures}"]


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        info = target.parent / "_build_info.json"
        for stale in (*target.parent.glob("_C*.so"), info):
            stale.unlink(missing_ok=True)
        try:
            torch = self.compile(target)
        except CannotBuild as reason:
            say(
                f"WARNING: {reason}, so no compiled operations were built; the slower reference ones are used"
            )
            info.write_text(json.dumps({"built": False, "reason": str(reason)}) + "\n")
            return
        facts = {"built": True, "torch_version": torch.version, "bytes": target.stat().st_size}
        info.write_text(json.dumps(facts) + "\n")

    def compile(self, target: Path) -> probe.Torch:
        if probe.find_compiler() is None:
            raise CannotBuild("no C++ compiler was found")
        cmake, ninja = probe.find_tool("cmake"), probe.find_tool("ninja")
        if cmake is None or ninja is None:
            raise CannotBuild("CMake or Ninja was not found")
        include = sysconfig.get_paths()["include"]
        if not (Path(include) / "Python.h").exists():
            raise CannotBuild("Python's C headers were not found")
        torch = probe.find_torch()
        if torch is None or torch.too_old:
            raise CannotBuild(f"torch {probe.MINIMUM} or newer was not found")
        say(f"building against torch {torch.version} in {torch.path}")

        # Kept between builds, one for each Python and torch. All paths are passed each time: pip's
        # isolated environments, where CMake, Ninja and perhaps torch live, have another name at every build.
        tree = ROOT / "build" / f"{sysconfig.get_config_var('SOABI')}-torch{torch.version}"
        options = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-DDIFFRATIO_OUTPUT={tree / 'out'}",
            f"-DDIFFRATIO_SUFFIX={sysconfig.get_config_var('EXT_SUFFIX')}",
            f"-DDIFFRATIO_PYTHON_INCLUDE={include}",
            f"-DDIFFRATIO_TORCH={torch.path}",
            f"-DDIFFRATIO_TORCH_VERSION={torch.version}",
            f"-DDIFFRATIO_TORCH_ABI={torch.cxx11_abi}",
        ]
        cuda = cuda_options()
        if cuda is not None and not self.configure(cmake, tree, [*options, "-DDIFFRATIO_CUDA=ON", *cuda]):
            if os.environ.get("DIFFRATIO_CUDA", "auto") == "1":
                raise SystemExit(
                    "error: DIFFRATIO_CUDA=1, but CMake cannot use the CUDA compiler (see above)"
                )
            say("CMake cannot use the CUDA compiler (see above); building for the CPU only")
            cuda = None
        if cuda is None and not self.configure(cmake, tree, [*options, "-DDIFFRATIO_CUDA=OFF"]):
            raise SystemExit("error: CMake cannot configure the build; the messages above say why")
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        self.call([cmake, "--build", str(tree), "--parallel", jobs])
        shutil.copy2(tree / "out" / target.name, target)
        return torch

    def copy_extensions_to_source(self) -> None:
        """The last step of in-place and editable builds."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name)).resolve()
            package = ROOT / "diffratio_fast"
            for stale in package.glob("_C*.so"):
                stale.unlink()
            for name in (built.name, "_build_info.json"):
                if (built.parent / name).exists():
                    # A new file, not new content in the old one, which a running process may have mapped.
                    (package / name).unlink(missing_ok=True)
                    shutil.copy2(built.parent / name, package / name)

    def configure(self, cmake: str, tree: Path, options: list[str]) -> bool:
        cache = tree / "CMakeCache.txt"
        if cache.exists() and f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}\n" not in cache.read_text():
            shutil.rmtree(tree)  # the source directory was moved or copied
        command = [cmake, "-S", str(ROOT), "-B", str(tree), "-G", "Ninja", *options]
        if cache.exists() and subprocess.run(command).returncode == 0:
            return True
        shutil.rmtree(tree, ignore_errors=True)  # a first try, or a stale cache (a compiler that has gone)
        return subprocess.run(command).returncode == 0

    @staticmethod
    def call(command: list[str]) -> None:
        failed = subprocess.run(command).returncode
        if failed:
            raise SystemExit("error: building the extension failed; the messages above say why")


setup(
    license="Apache-2.0", ext_modules=[Extension("diffratio_fast._C", [])], cmdclass={"build_ext": CMakeBuild}
)
