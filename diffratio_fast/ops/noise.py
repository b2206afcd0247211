"""Counter-based random numbers and the fused ``add_noise``.

The noise contract: every random number of a training run depends only on (seed, step, sample index, purpose,
substep, draw, element). It does not depend on device, batch size, threads, ranks or earlier draws.

- Streams: purpose, substep and draw identify a stream. The two halves of a ratio step have the purposes
  ``ops.SHARED_NOISE`` (both NOISE_REAL: a pair shares its eps) or ``ops.SEPARATE_NOISE`` (NOISE_REAL and
  NOISE_FAKE). Shared noise does not change the distribution of a half, so its expectations are unchanged.
- Generator: Philox4x32-10 (Salmon et al., SC 2011). Key: low and high 32 bits of the seed. Counter:
  (element // 4, low 32 bits of step, low 32 bits of index, purpose << 24 | substep << 16 | draw). Element i
  of a sample is word i % 4 of counter i // 4.
- Normals: words (0, 1) and (2, 3) of a counter are Box-Muller pairs; u = ((first >> 8) + 1) 2^-24,
  r = sqrt(-2 ln u), theta = 2 pi second 2^-32, normals r cos(theta) and r sin(theta) in float32. Fixed
  polynomials define these functions (``csrc/common/normal.h``), so results are bit-identical on every
  device. They are within 1e-6 of the exact formulas.

``rng`` is a tensor int64 [2] = (seed, step) on the device of the operation. It is not modified.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffratio_fast.ops import compiled, noise_checks, reference_noise


def make_rng(seed: int, step: int, device: torch.device | str | None = None) -> Tensor:
    """The ``rng`` argument of the operations: int64 [2] = (seed, step).

    The seed is taken modulo 2^64. Only the low 32 bits of the step are used.
    """
    for name, value in (("seed", seed), ("step", step)):
        if not -(1 << 63) <= value < 1 << 64:
            raise ValueError(f"{name} must fit in 64 bits, got {value}")
    signed = [((value + (1 << 63)) % (1 << 64)) - (1 << 63) for value in (seed, step)]
    return torch.tensor(signed, dtype=torch.int64, device=device)


def random_words(
    rng: Tensor, index: Tensor, purpose: int, count: int, *, substep: int = 0, draw: int = 0
) -> Tensor:
    """Return uniform 32-bit words as int64 [N, count], values 0 to 2^32 - 1.

    ``index``: int64 [N], the samples' global indices, on the device of ``rng``. ``purpose`` < 256 (see
    :class:`Purpose`), ``substep`` < 256 and ``draw`` < 65536 identify the stream. Raises ``ValueError`` for a
    wrong shape, dtype or device.
    """
    if not compiled.compiled_for(rng):
        return reference_noise.random_words(rng, index, purpose, count, substep=substep, draw=draw)
    noise_checks.stream(rng, index, [purpose], substep, draw)
    noise_checks.size(count)
    return torch.ops.diffratio.random_words(rng, index, int(purpose), count, substep, draw)


def uniform(
    rng: Tensor, index: Tensor, purpose: int, count: int, *, substep: int = 0, draw: int = 0
) -> Tensor:
    """Uniform numbers in the open interval (0, 1): float64 [N, count], (word + 0.5) 2^-32.

    Arguments, errors and words are those of :func:`random_words`.
    """
    words = random_words(rng, index, purpose, count, substep=substep, draw=draw)
    return (words.double() + 0.5) * 2.0**-32


def normal(
    rng: Tensor, index: Tensor, shape: Sequence[int], purpose: int, *, substep: int = 0, draw: int = 0
) -> Tensor:
    """Standard normal numbers: float32 [N, *shape]; the largest magnitude is sqrt(48 ln 2) = 5.77.

    Arguments and errors are those of :func:`random_words`. :func:`add_noise` adds the same numbers as eps for
    the same (rng, index, purpose, substep, draw).
    """
    if not compiled.compiled_for(rng):
        return reference_noise.normal(rng, index, shape, purpose, substep=substep, draw=draw)
    noise_checks.stream(rng, index, [purpose], substep, draw)
    noise_checks.size(*shape)
    return torch.ops.diffratio.normal(rng, index, list(shape), int(purpose), substep, draw)


def add_noise(
    x0: Tensor | tuple[Tensor, ...],
    sigma: Tensor,
    rng: Tensor,
    index: Tensor,
    purpose: int | tuple[int, ...],
    *,
    substep: int = 0,
    draw: int = 0,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return ``(x0 + sigma eps) scale`` with eps from the noise contract; one kernel launch.

    ``x0``: [B, ...], float32, bfloat16, float16 or float64, or a tuple of such inputs of the same shape, such
    as (real, fake). For a tuple, ``purpose`` is a tuple of the same length. Inputs with the same purpose
    share their eps, which is generated once (``ops.SHARED_NOISE``). The results are concatenated in order:
    [len * B, ...]. All inputs share ``sigma``, ``index`` and ``scale``. ``sigma``: floating point [B].
    ``scale``: floating point [B], default 1. ``index``: int64 [B]. ``dtype``: float32, bfloat16 or float16,
    default that of ``x0`` (float64 stays float64).

    The arithmetic is fma(sigma, eps, x0), then times scale, in float32, with one rounding to ``dtype``.
    float64 inputs use double arithmetic with the same float32 eps. The gradient with respect to x0 is
    upstream times scale. ``sigma`` and ``scale`` are not differentiable: ``ValueError`` if one requires a
    gradient. On the CPU a NaN in ``sigma`` raises ``ValueError``; on CUDA that sample becomes NaN. Wrong
    shapes, devices or dtypes raise ``ValueError`` or ``TypeError``. Source (variance-exploding noise):
    Karras et al., "Elucidating the design space of diffusion-based generative models", 2022, section 2.
    """
    if not compiled.compiled_for(rng):
        return reference_noise.add_noise(
            x0, sigma, rng, index, purpose, substep=substep, draw=draw, scale=scale, dtype=dtype
        )
    a = noise_checks.add_noise(x0, sigma, rng, index, purpose, substep, draw, scale, dtype)
    return torch.ops.diffratio.add_noise(
        a.inputs, a.sigma, rng, index, a.purposes, substep, draw, a.scale, a.dtype
    )


def _add_noise_fake(
    x0: list[Tensor], sigma: Tensor, rng: Tensor, index: Tensor, purposes: list[int], substep: int, draw: int,
    scale: Tensor | None, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    return x0[0].new_empty((len(x0) * x0[0].shape[0], *x0[0].shape[1:]), dtype=dtype)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.count, ctx.dtype = len(inputs[0]), inputs[0][0].dtype
    ctx.save_for_backward(inputs[7])


def _add_noise_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (scale,) = ctx.saved_tensors
    if scale is not None:
        column = scale.repeat(ctx.count).reshape((-1,) + (1,) * (gradient.dim() - 1))
        gradient = gradient.to(scale.dtype) * column
    batch = gradient.shape[0] // ctx.count
    halves = [half.to(ctx.dtype) for half in gradient.split([batch] * ctx.count)]
    return halves, None, None, None, None, None, None, None, None


def _register() -> None:
    """Register fake implementations for torch.compile and gradients for autograd."""
    register_fake = torch.library.register_fake
    register_fake("diffratio::random_words")(
        lambda rng, index, purpose, count, substep, draw: index.new_empty((index.shape[0], count))
    )
    register_fake("diffratio::normal")(
        lambda rng, index, shape, purpose, substep, draw: index.new_empty(
            (index.shape[0], *shape), dtype=torch.float32
        )
    )
    register_fake("diffratio::add_noise")(_add_noise_fake)
    torch.library.register_autograd("diffratio::add_noise", _add_noise_backward, setup_context=_setup_context)


if compiled.module is not None:
    _register()
