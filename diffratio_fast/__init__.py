"""One-step image generators by density-ratio training, with fused operations. Import what you need:
``diffratio_fast.ops``, ``.networks``, ``.objectives``, ``.data``, ``.training``."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build_info"]


def build_info() -> dict[str, Any]:
    """What the compiled operations were built with, as a dictionary.

    ``built`` (bool) says whether they are in use; if not, ``reason`` says why and the reference operations
    are. Otherwise: ``compiler``, ``cuda_archs`` (empty without CUDA), ``cuda_version`` (None without),
    ``torch_version``, ``simd_levels`` (compiled), ``simd_level`` (in use), ``openmp``.
    """
    from diffratio_fast.ops import compiled  # imports torch: only when asked

    return compiled.build_info()
