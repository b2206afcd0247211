"""One-step image generators by density-ratio training, with fused operations. Import what you need:
``diffratio_fast.ops``, ``.networks``, ``.objectives``, ``.data``, ``.training``."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "build_info"]


def build_info() -> dict[str, Any]:
    """Return the build configuration of the compiled operations as a dictionary.

    ``built`` (bool): whether they are in use. If not, the reference operations are in use and ``reason``
    (str) is the cause. Otherwise: ``compiler``, ``cuda_archs`` (empty without CUDA), ``cuda_version`` (None
    without CUDA), ``torch_version``, ``simd_levels`` (compiled), ``simd_level`` (in use), ``openmp``.
    """
    from diffratio_fast.ops import compiled  # imports torch, so only on demand

    return compiled.build_info()
