"""Versions, device and source revision of a run."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import torch

import diffratio_fast
from diffratio_fast.devices import device_name
from diffratio_fast.ops import compiled


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, device and source revision."""
    return {
        "diffratio_fast": diffratio_fast.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "simd": compiled.build_info().get("simd_level"),
    }


def _git_commit() -> str | None:
    """The git revision of the package's source tree; None outside a git checkout."""
    source = Path(__file__).resolve().parents[2]
    if not (source / ".git").exists():
        return None
    try:
        command = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
