"""One-step image generators by density-ratio training, with fused operations. Import what you need:
``diffratio_fast.ops``, ``.networks``, ``.objectives``, ``.data``, ``.training``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from diffratio_fast.sampling.trained import TrainedGenerator

__version__ = "0.1.0"
__all__ = ["__version__", "build_info", "load_generator"]


def build_info() -> dict[str, Any]:
    """Return the build configuration of the compiled operations as a dictionary.

    ``built`` (bool): whether they are in use. If not, the reference operations are in use and ``reason``
    (str) is the cause. Otherwise: ``compiler``, ``cuda_archs`` (empty without CUDA), ``cuda_version`` (None
    without CUDA), ``torch_version``, ``simd_levels`` (compiled), ``simd_level`` (in use), ``openmp``,
    ``cuda_kernels`` ("ahead of time", "run time" through cupy, or "reference").
    """
    from diffratio_fast.ops import compiled  # imports torch, so only on demand

    return compiled.build_info()


def load_generator(
    path: str | Path,
    *,
    device: str = "auto",
    vae: str | Path | None = None,
    verifier: str | Path | None = None,
) -> TrainedGenerator:
    """Load a trained generator: ``load_generator("runs/digits").sample(8)``.

    ``path``: a run directory, its ``generator.safetensors``, or a snapshot. ``device``: auto, cpu, cuda or
    cuda:N. ``vae``: the AutoencoderKL that decodes latents. ``verifier``: a ratio network's file (default:
    the run's own). Bad input is a ``diffratio_fast.errors.UserError``.
    """
    from diffratio_fast.sampling import trained  # imports torch: only when asked

    return trained.load_generator(path, device=device, vae=vae, verifier=verifier)
