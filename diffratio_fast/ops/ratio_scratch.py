"""What the operations of a RatioMixer take beside their arguments and results, for plans of memory.

Their compiled twins ask for it inside, where nothing that follows tensors sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

GROUPS = 16
"""Groups of samples whose weight gradients the CPU twin sums apart (csrc/cpu/mixer.cpp)."""
CUDA_WORKSPACE = 256 << 20
"""Bytes of staged operands that the CUDA twin takes at most (csrc/ratio_cuda_bindings.cpp)."""


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


def cuda_packed_bytes(weights: Sequence[Tensor]) -> int:
    """What ``pack_weights`` makes on CUDA, as csrc/cuda/ratio/mixer_layout.h lays it out."""
    (width, patch), (tokens, _), (depth, hidden, _) = weights[0].shape, weights[1].shape, weights[4].shape
    tokens, hidden, patch = _up(tokens, 32 if tokens > 128 else 16), _up(hidden, 32), _up(patch, 16)
    width = 64 if width <= 64 else 128 if width <= 128 else 256
    parts = [4 * tokens * width] * 2 + [4 * depth * tokens] + [2 * patch * width] * 2
    parts += [2 * depth * tokens * tokens] * 2 + [4 * depth * hidden * width, 6 * depth * hidden * width]
    return sum(_up(part, 512) for part in parts)


def scratch_bytes(
    operation: str, weights: Sequence[Tensor], samples: int, *, device: str, threads: int
) -> int:
    """Bytes that ``operation`` takes for ``samples`` (both halves) on ``device`` (cpu or cuda).

    ``weights`` are in the order of ``weight_shapes``. Within a few per cent: padding differs with the
    processor, and the CUDA twin's grid with the GPU.
    """
    (width, patch), (tokens, _) = weights[0].shape, weights[1].shape
    depth, hidden, _ = weights[4].shape
    backward = operation != "log_ratio"
    gradients = operation in ("ratio_loss", "log_ratio_backward")
    tokens, width, hidden, patch = _up(tokens, 16), _up(width, 32), _up(hidden, 32), _up(patch, 16)
    wide, high = tokens * width, tokens * hidden
    matrices = depth * (tokens * tokens + 2 * width * hidden) + width * patch
    if device == "cuda":
        packed = cuda_packed_bytes(weights)
        if not gradients:
            return packed
        staged = 2 * (tokens * patch + 2 * wide + depth * (4 * wide + 2 * high)) + 4 * depth * tokens
        sums = 4 * (matrices + 2 * wide)
        return packed + min(max(CUDA_WORKSPACE, staged), samples * staged) + sums
    packed = matrices * (2 if backward else 1) + 2 * wide + depth * tokens
    kept = (2 * depth + 1) * wide + depth * high if gradients else 2 * wide + high
    own = kept + (depth * high + 2 * wide + high + tokens * patch if backward else 0)
    own += 2 * tokens * patch + width + depth * hidden + max(width, hidden) + (wide if gradients else 0)
    groups = min(GROUPS, samples) if gradients else 0
    sums = groups * (matrices + 2 * wide + depth * tokens)
    widened = sum(w.numel() for w in weights if w.dtype != torch.float32)
    return 4 * (packed + widened + min(threads, groups or samples) * own + sums)
