"""The CUDA kernels' bodies executed on the CPU (tests/simt), and CUDA's compiler's report on them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffratio_fast.ops import _module

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "build_backend"))
import probe  # noqa: E402

needs_compiler = pytest.mark.skipif(probe.find_compiler() is None, reason="there is no C++ compiler")


def build(folder: Path, *flags: str) -> Path:
    program = folder / "simt"
    sources = ["tests/simt/noise.cpp", "csrc/cpu/noise.cpp", "csrc/cpu/noise_level.cpp"]
    command = [
        probe.find_compiler(), "-std=c++20", "-O1", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror",
        "-DDR_LEVEL=portable", *flags, *(str(ROOT / source) for source in sources), "-o", str(program),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program


def have_sanitizers(folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() {}\n")
    command = [
        probe.find_compiler(),
        "-fsanitize=address,undefined",
        str(source),
        "-o",
        str(folder / "empty"),
    ]
    return subprocess.run(command, capture_output=True).returncode == 0


@needs_compiler
def test_kernels_on_the_cpu(tmp_path):
    flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"] if have_sanitizers(tmp_path) else []
    program = build(tmp_path, *flags)
    result = subprocess.run([program], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert int(re.search(r"(\d+) comparisons", result.stdout)[1]) > 500
    result = subprocess.run([program, "sabotage"], capture_output=True, text=True)
    assert result.returncode == 1 and "add_noise differs" in result.stdout


@pytest.mark.slow
def test_ptxas_report_is_within_the_limits():
    result = subprocess.run(
        [sys.executable, ROOT / ".ci" / "check_cuda"], capture_output=True, text=True, env=dict(os.environ)
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "within their limits" in result.stdout or "no nvcc" in result.stdout


def test_no_module_is_claimed_to_have_cuda_without_architectures():
    info = _module.build_info()
    if info["built"]:
        assert bool(info["cuda_archs"]) == (info["cuda_version"] is not None)
