"""Devices: choice by name, product name, peak memory."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import torch

from diffratio_fast import launch
from diffratio_fast.errors import UserError


def choose_device(name: str) -> torch.device:
    """Return the device for ``--device``; raises ``UserError`` if it is not available.

    Under torchrun, ``auto`` and ``cuda`` select the GPU of this process.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name == "auto" or (name == "cuda" and launch.launched() and torch.cuda.is_available()):
        return torch.device("cuda", launch.local_process()[0] % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; expected auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported; expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: PyTorch finds no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: no such GPU; expected an index below {torch.cuda.device_count()}")
    return device


def device_name(device: torch.device) -> str:
    """Product name of the GPU or the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def peak_memory(device: torch.device) -> int:
    """Peak memory so far in bytes: of the GPU, or of the process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
