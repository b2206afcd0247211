"""Score distillation, the baseline: the score difference of two denoisers in place of a ratio's gradient.

A frozen teacher denoises data; a student, trained online, denoises generated images. By Tweedie's
formula the generator descends s_gen - s_data = (D_student - D_teacher) / sigma^2.
Variational score distillation (Wang et al. 2023, "ProlificDreamer"), Diff-Instruct (Luo et al. 2023) and
distribution matching distillation (Yin et al. 2024, "One-step Diffusion with Distribution Matching
Distillation") are variants with other weights; all minimize KL(p_gen,sigma || p_data,sigma).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.objectives.denoising import DenoiserCall, denoising_errors

SMALLEST = 1e-5
"""The least mean |x0 - D_teacher| that a gradient is divided by."""


class DenoiserDifference(NamedTuple):
    """gradient: like ``fake``, per sample (no 1/B); distance [B, K]: mean |D_student - D_teacher|."""

    gradient: Tensor
    distance: Tensor


def student_errors(
    student: DenoiserCall,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    substep: int = 0,
    stable_targets: bool = False,
) -> Tensor:
    """Weighted denoising errors [B] of clean generated images [B, C, H, W] at sigma [B].

    Differentiable only in the student's weights; at the optimum the student is E[x0 | x_sigma] under the
    generator's law.
    """
    return denoising_errors(
        student, fake.detach(), sigma, labels, rng, index, ops.Purpose.NOISE_FAKE,
        substep=substep, stable_targets=stable_targets,
    )  # fmt: skip


@torch.no_grad()
def score_difference(
    student: DenoiserCall,
    teacher: DenoiserCall,
    fake: Tensor,
    sigma: Tensor,
    labels: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    weight: Tensor,
    normalize: bool = False,
) -> DenoiserDifference:
    """Gradient for the generator: (1/K) sum_k w(sigma_k) (D_student - D_teacher) / sigma_k^2, per sample.

    ``fake`` [B, C, H, W]; ``sigma`` and ``weight`` [B, K], each draw with independent noise (that of
    ``diffratio.score_difference``). ``normalize`` divides a draw by the sample's mean |x0 - D_teacher|, the
    scale that DMD gives its gradient (Yin et al. 2024, eq. 8).
    """
    clean = fake.detach()
    gradient = torch.zeros_like(clean, dtype=torch.promote_types(clean.dtype, torch.float32))
    distances = []
    for k in range(sigma.shape[1]):
        level = sigma[:, k]
        noised = ops.add_noise(clean, level, rng, index, ops.Purpose.NOISE_GENERATOR, draw=k)
        target = teacher(noised, level, labels)
        difference = student(noised, level, labels) - target
        factor = weight[:, k] / level**2 / sigma.shape[1]
        if normalize:
            factor = factor / (clean - target).abs().flatten(1).mean(1).clamp(min=SMALLEST)
        gradient += factor.reshape(-1, *(1,) * (clean.dim() - 1)) * difference
        distances.append(difference.abs().flatten(1).mean(1))
    return DenoiserDifference(gradient, torch.stack(distances, 1))
