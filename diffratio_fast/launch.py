"""Rank and world size of this process from the environment of a launcher (torchrun). Imports no torch."""

from __future__ import annotations

import os


def process() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def local_process() -> tuple[int, int]:
    """(rank, number of processes) on this machine."""
    _, size = process()
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", size))


def launched() -> bool:
    """Whether a launcher started this process; it then forwards signals."""
    return "TORCHELASTIC_RUN_ID" in os.environ or process()[1] > 1


def restarts() -> int:
    """Number of restarts by the launcher, as after a crash."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
