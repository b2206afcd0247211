"""Memory that the ratio operations allocate besides their arguments and results, for memory estimates.

The compiled implementations allocate it internally, so a tensor tracker does not count it. The planner is
C++ (``plan_ratio`` in ``csrc/ratio_bindings.cpp``) and needs no GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffratio_fast.ops import compiled
from diffratio_fast.ops.ratio_checks import NAMES, Layout

GPU_BLOCKS = 132
"""Thread blocks that run at once on the planned GPU: one per multiprocessor of an H100."""


def _layout(weights: Sequence[Tensor]) -> Layout:
    """A layout for these weights; the memory does not depend on the image shape of a patch."""
    (width, patch), (tokens, _), (depth, hidden, _) = weights[0].shape, weights[1].shape, weights[4].shape
    return Layout(patch, tokens, 1, 1, tokens, width, depth, hidden, len(weights) == len(NAMES))


def _plan(
    operation: str, weights: Sequence[Tensor], samples: int, device: str, parallel: int
) -> dict[str, int]:
    plan: dict[str, int] = compiled.module.plan_ratio(operation, device, _layout(weights), samples, parallel)
    return plan


def cuda_packed_bytes(weights: Sequence[Tensor]) -> int:
    """Bytes of the result of ``pack_weights`` on CUDA."""
    return _plan("log_ratio", weights, 1, "cuda", 1)["packed"]


def scratch_bytes(
    operation: str, weights: Sequence[Tensor], samples: int, *, device: str, threads: int
) -> int:
    """Bytes that ``operation`` allocates for ``samples`` (of both halves) on ``device`` (cpu or cuda).

    ``weights`` are in the order of ``weight_shapes``; ``threads`` is the number of CPU threads. The CUDA
    result is for an H100. Other GPUs have another grid size; the result differs by a few percent.
    """
    plan = _plan(operation, weights, samples, device, GPU_BLOCKS if device == "cuda" else threads)
    copies = sum(4 * w.numel() for w in weights if w.dtype != torch.float32) if device == "cpu" else 0
    return plan["packed"] + plan["workspace"] + copies
