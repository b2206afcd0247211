"""The device that something runs on: chosen by name, and called by its product name."""

from __future__ import annotations

import platform
import resource
import sys
from pathlib import Path

import torch

from diffratio_fast import launch
from diffratio_fast.errors import UserError


def choose_device(name: str) -> torch.device:
    """The device that ``--device`` names; one that is not there is a ``UserError``.

    ``auto`` and ``cuda`` under torchrun are the GPU of this process's own.
    """
    if name == "auto" and not torch.cuda.is_available():
        return torch.device("cpu")
    if name == "auto" or (name == "cuda" and launch.launched() and torch.cuda.is_available()):
        return torch.device("cuda", launch.local_process()[0] % torch.cuda.device_count())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"--device {name}: this PyTorch finds no GPU; use --device cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name}: there are {torch.cuda.device_count()} GPUs")
    return device


def device_name(device: torch.device) -> str:
    """The product name of a GPU, or of the processor."""
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
    """Peak bytes so far: of the device where it is a GPU, of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
