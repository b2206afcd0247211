"""Latents and images of a generator."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffratio_fast import ops

BATCH = 256


@torch.no_grad()
def generate(generator: nn.Module, labels: Tensor, seed: int, start: int = 0) -> Tensor:
    """Generate samples ``start`` to ``start + N - 1`` of a seed, with labels int64 [N]: x0 [N, C, H, W].

    Every bit of a sample is a function of (seed, number, label), independent of ``N``: samples are always
    generated in batches of ``BATCH``, because the rounding of a matrix product depends on its size.
    """
    device = next(generator.parameters()).device
    rng = ops.make_rng(seed, 0, device)
    images: list[Tensor] = []
    for block in range(start // BATCH, -(-(start + len(labels)) // BATCH)):
        index = torch.arange(block * BATCH, (block + 1) * BATCH, device=device)
        place = index - start
        inside = (place >= 0) & (place < len(labels))
        block_labels = torch.zeros(BATCH, dtype=torch.int64, device=device)
        block_labels[inside] = labels.to(device)[place[inside]]
        latents = latents_for(generator, rng, index, ops.Purpose.SAMPLE_LATENT)
        images.append(generator(latents, block_labels)[inside])
    return torch.cat(images)


def latents_for(
    generator: nn.Module, rng: Tensor, index: Tensor, purpose: ops.Purpose, *, substep: int = 0
) -> Tensor:
    """Standard normal latents of the generator's dtype, [N, *latent_shape], for sample indices [N]."""
    shape: tuple[int, ...] = generator.latent_shape  # type: ignore[assignment]
    dtype = next(generator.parameters()).dtype
    return ops.normal(rng, index, shape, purpose, substep=substep).to(dtype)
