"""The noise operations in plain PyTorch: their definition, on any device.

The arithmetic repeats ``csrc/common/philox.h`` and ``normal.h`` step by step. Results are bit-identical to
the compiled implementations. Change both together. Fused multiply-add is emulated exactly in float64.
Signatures, shapes and errors are those of the public functions in ``ops.noise``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffratio_fast.ops import noise_checks

_MASK = 0xFFFFFFFF


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors of 32-bit words; shapes broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The 64-bit products overflow in int64; both halves are correct after masking.
        p0 = c0 * 0xD2511F53
        p1 = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32) & _MASK ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) & _MASK ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def _words(rng: Tensor, index: Tensor, count: int, purpose: int, substep: int, draw: int) -> Tensor:
    """Random words: int64 [N, count rounded up to a multiple of 4]."""
    seed, step = rng[0], rng[1]
    key = (seed & _MASK, (seed >> 32) & _MASK)
    counters = torch.arange((count + 3) // 4, dtype=torch.int64, device=rng.device)
    stream = torch.full((), purpose << 24 | substep << 16 | draw, dtype=torch.int64, device=rng.device)
    words = philox4x32_10((counters, step & _MASK, (index & _MASK)[:, None], stream), key)
    return torch.stack(words, dim=-1).flatten(1)


def random_words(
    rng: Tensor, index: Tensor, purpose: int, count: int, *, substep: int = 0, draw: int = 0
) -> Tensor:
    """See :func:`diffratio_fast.ops.random_words`."""
    noise_checks.stream(rng, index, [purpose], substep, draw)
    noise_checks.size(count)
    return _words(rng, index, count, int(purpose), substep, draw)[:, :count].contiguous()


def _fma(a: Tensor, b: Tensor | float, c: Tensor | float) -> Tensor:
    """The float32 fused multiply-add a * b + c, correctly rounded (to nearest even).

    The product of two float32 is exact in float64. The sum is rounded to odd: Knuth's TwoSum gives
    its exact error, and an inexact sum with an even last bit moves one unit towards the exact value. Rounding
    this to float32 equals a single rounding (Boldo and Melquiond, 2008).
    """
    product = a.double() * (b.double() if isinstance(b, Tensor) else b)
    addend = c.double() if isinstance(c, Tensor) else torch.full_like(product, c)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    bits = total.view(torch.int64)
    inexact = ((error > 0) | (error < 0)) & (bits & 1 == 0)
    away = (error > 0) == (total > 0)
    bits = torch.where(inexact, torch.where(away, bits + 1, bits - 1), bits)
    return bits.view(torch.float64).float()


def _horner(x: Tensor, *coefficients: str) -> Tensor:
    """The polynomial with these float32 coefficients (hexadecimal, highest power first), in fma."""
    first, *rest = (float.fromhex(c) for c in coefficients)
    value = torch.full_like(x, first)
    for c in rest:
        value = _fma(value, x, c)
    return value


def _radius(word: Tensor) -> Tensor:
    """float32 sqrt(-2 ln u), u = ((word >> 8) + 1) 2^-24."""
    u = (word >> 8).float() * 2.0**-24 + 2.0**-24
    bits = u.view(torch.int32)
    k23 = (bits - 0x3F2AAAAB) & -0x800000
    s = (bits - k23).view(torch.float32) - 1.0
    q = _horner(
        s, "-0x1.25295ep-2", "0x1.3dd1e4p-2", "-0x1.1d4e10p-2", "0x1.4fa594p-2", "-0x1.99ebe4p-2",
        "0x1.0018d8p-1", "-0x1.5554bcp-1", "0x1.ffffc2p-1", "-0x1p1",
    )  # fmt: skip
    x = _fma(k23.float(), float.fromhex("-0x1.62e430p-23"), s * q)
    # float64, because torch's float32 square root may not be correctly rounded. Double rounding is safe: no
    # float32 has a root that close to a midpoint of two float32.
    return torch.sqrt(x.double()).float()


def _cosine_sine(word: Tensor) -> tuple[Tensor, Tensor]:
    """float32 cosine and sine of word 2^-32 turns."""
    eighths = (word << 2) & _MASK
    a = (eighths - ((eighths >> 31) << 32)).float() * 2.0**-31
    y = a * a
    s = _horner(y, "-0x1.2cf5d4p-15", "0x1.465a3ep-9", "-0x1.4abba8p-4", "0x1.ce0a14p-26")
    s = _fma(a, float.fromhex("0x1.921fb4p-1"), s * a)
    c = _horner(y, "0x1.d9f7bcp-19", "-0x1.55c664p-12", "0x1.03c1dep-6", "-0x1.3bd3ccp-2", "0x1p0")
    quarter = word + 0x20000000
    swap = quarter & 0x40000000 != 0
    cosine, sine = torch.where(swap, s, c), torch.where(swap, c, s)
    cosine = torch.where((quarter + 0x40000000) & 0x80000000 != 0, -cosine, cosine)
    sine = torch.where(quarter & 0x80000000 != 0, -sine, sine)
    return cosine, sine


def _normals(
    rng: Tensor, index: Tensor, shape: Sequence[int], purpose: int, substep: int, draw: int
) -> Tensor:
    count = math.prod(shape)
    words = _words(rng, index, count, purpose, substep, draw)
    radius = _radius(words[:, 0::2])
    cosine, sine = _cosine_sine(words[:, 1::2])
    values = torch.stack((radius * cosine, radius * sine), dim=-1).flatten(1)
    return values[:, :count].reshape(index.shape[0], *shape)


def normal(
    rng: Tensor, index: Tensor, shape: Sequence[int], purpose: int, *, substep: int = 0, draw: int = 0
) -> Tensor:
    """See :func:`diffratio_fast.ops.normal`."""
    noise_checks.stream(rng, index, [purpose], substep, draw)
    noise_checks.size(*shape)
    return _normals(rng, index, shape, int(purpose), substep, draw).contiguous()


class _Noised(torch.autograd.Function):
    """float32 x0 + sigma eps in one rounding; the derivative with respect to x0 is 1."""

    @staticmethod
    def forward(ctx: Any, x0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
        return _fma(sigma, eps, x0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


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
    """See :func:`diffratio_fast.ops.add_noise`."""
    a = noise_checks.add_noise(x0, sigma, rng, index, purpose, substep, draw, scale, dtype)
    if a.sigma.device.type == "cpu" and not torch.compiler.is_compiling() and bool(a.sigma.isnan().any()):
        raise ValueError("sigma contains NaN")
    column = (-1,) + (1,) * (a.inputs[0].dim() - 1)
    level = a.sigma.reshape(column)
    shape = a.inputs[0].shape[1:]
    normals = {stream: _normals(rng, index, shape, stream, substep, draw) for stream in set(a.purposes)}
    halves = []
    for x, stream in zip(a.inputs, a.purposes, strict=True):
        eps = normals[stream]
        if a.compute is torch.float64:
            noised = x + level * eps.double()
        else:
            noised = _Noised.apply(x.float(), level.expand_as(eps), eps)
        halves.append(noised if a.scale is None else noised * a.scale.reshape(column))
    return torch.cat(halves).to(a.dtype)
