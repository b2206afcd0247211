"""CUDA's compiler's report on the kernels, and what the built module says of CUDA."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffratio_fast.ops import _module

ROOT = Path(__file__).resolve().parent.parent


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
