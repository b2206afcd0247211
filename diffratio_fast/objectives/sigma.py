"""Noise levels drawn from a law, as a function of (seed, step, sample, purpose)."""

from __future__ import annotations

from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.config.noise_laws import NoiseLaw


def sample_sigma(
    law: NoiseLaw,
    rng: Tensor,
    index: Tensor,
    purpose: ops.Purpose,
    *,
    substep: int = 0,
    draws: int = 1,
) -> tuple[Tensor, Tensor]:
    """(sigma float32 [B, draws], its uniform numbers float64 [B, draws]) for sample indices [B]."""
    uniforms = ops.uniform(rng, index, purpose, draws, substep=substep)
    return law.quantile(uniforms).float(), uniforms
