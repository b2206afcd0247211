"""Fused elementwise operations of EDM2's magnitude-preserving U-Net (Karras et al. 2024, arXiv 2312.02696).

Images are [N, C, H, W] in float32, bfloat16 or float16, contiguous or channels_last; any other layout is
copied first. float64 uses the reference. Arithmetic is float32. Each result is rounded once to the input's
dtype and has the layout of the first tensor. Forward and backward are one pass over memory each. "Bytes" in
the docstrings are bytes read and written per element of the result. s is the size of an element in bytes (2
for bfloat16). Terms smaller by a factor of the number of channels or pixels are not counted.

Operations do not modify their arguments, do not synchronize with the device and are deterministic. They have
first derivatives only. For second derivatives use the reference, ``ops.reference_edm2``, which defines the
operations. Autocast does not change dtypes; tensors that are joined get the wider dtype. NaN is propagated.
Wrong shapes, layouts, devices or dtypes raise ``ValueError`` or ``TypeError``. An empty batch gives an empty
result. docs/edm2_ops.md shows how to use the operations in another network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from diffratio_fast.ops import compiled
from diffratio_fast.ops import reference_edm2 as reference
from diffratio_fast.ops.purpose import Purpose

HAS_OPERATIONS = compiled.module is not None and hasattr(torch.ops.diffratio, "pixel_norm_silu")
HAS_CUDA = HAS_OPERATIONS and torch._C._dispatch_has_kernel_for_dispatch_key(
    "diffratio::pixel_norm_silu", "CUDA"
)
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
MAX_NORM_CHANNELS, MAX_SCALE_CHANNELS, MAX_HEAD_SIZE = 2048, 8192, 256


def compiled_for(x: Tensor) -> bool:
    """Whether the fused operations have compiled code for a tensor of this device and type."""
    kind = x.device.type
    return HAS_OPERATIONS and x.dtype in FLOATS and (kind == "cpu" or (kind == "cuda" and HAS_CUDA))


def _describe(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _image(name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{name} must be images [N, C, H, W], got {_describe(x)}")
    _floating(name, x)


def _floating(name: str, x: Tensor) -> None:
    if x.dtype not in FLOATS and x.dtype != torch.float64:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {_describe(x)}")


def _alike(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return both tensors in the wider dtype; check dtypes and devices."""
    for name, x in (("a", a), ("b", b)):
        _floating(name, x)
    if a.device != b.device:
        raise ValueError(f"a and b must be on one device, got {a.device} and {b.device}")
    dtype = torch.promote_types(a.dtype, b.dtype)
    return a.to(dtype), b.to(dtype)


def _balance(t: float) -> None:
    if not 0 <= t <= 1:
        raise ValueError(f"t must be between 0 and 1, got {t}")


def pixel_norm_silu(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (y, mp_silu(y)) with y = x / (1e-4 + rms of x over channels): start of an encoder block.

    x, y: [N, C, H, W], same dtype. Errors: see the module. Source: EDM2, Eq. 30 and 81. Saves x.
    Bytes: forward 3 s, backward 4 s, both the minimum.
    """
    _image("x", x)
    if not compiled_for(x) or x.shape[1] > MAX_NORM_CHANNELS:
        return reference.pixel_norm_silu(x)
    normalized, activated = torch.ops.diffratio.pixel_norm_silu(x)
    return normalized, activated


def scale_silu(
    x: Tensor,
    condition: Tensor,
    *,
    dropout: float = 0.0,
    rng: Tensor | None = None,
    index: Tensor | None = None,
    substep: int = 0,
    layer: int = 0,
) -> Tensor:
    """Dropout of mp_silu(x (condition + 1)), between the two convolutions of a block.

    x [N, C, H, W] and ``condition`` [N, C] are differentiable. The result is like x. With ``dropout`` > 0
    elements are zeroed with that probability and the others are divided by 1 - dropout. The mask depends only
    on ``rng`` int64 [2] = (seed, step), ``index`` int64 [N], ``substep`` and ``layer`` (purpose DROPOUT of
    the noise contract). The backward pass recomputes it. Errors: see the module. Saves x and condition.
    Bytes: forward 2 s, backward 3 s, both the minimum.
    """
    _image("x", x)
    if tuple(condition.shape) != tuple(x.shape[:2]):
        raise ValueError(f"condition must be [N, C] = {list(x.shape[:2])}, got {_describe(condition)}")
    if condition.device != x.device:
        raise ValueError(f"condition must be on {x.device}, it is on {condition.device}")
    _floating("condition", condition)
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")
    if dropout:
        if rng is None or index is None:
            raise ValueError("dropout needs rng and index")
        if index.dim() != 1 or len(index) != len(x):
            raise ValueError(f"index must be int64 [N] = [{len(x)}], got {_describe(index)}")
    condition = condition.to(x.dtype)
    if not compiled_for(x) or x.shape[1] > MAX_SCALE_CHANNELS:
        return reference.scale_silu(
            x, condition, dropout=dropout, rng=rng, index=index, substep=substep, layer=layer
        )
    out: Tensor = torch.ops.diffratio.scale_silu(
        x, condition, rng, index, float(dropout), int(Purpose.DROPOUT), substep, layer
    )
    return out


def mp_silu(x: Tensor) -> Tensor:
    """SiLU divided by 0.596, its root mean square for standard normal input (EDM2, Eq. 81).

    x has any shape; the result has the shape and dtype of x. Errors: see the module. Saves x.
    Bytes: forward 2 s, backward 3 s, both the minimum.
    """
    _floating("x", x)
    if not compiled_for(x):
        return reference.mp_silu(x)
    activated: Tensor = torch.ops.diffratio.mp_silu(x)
    return activated


def sum_clamp(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> Tensor:
    """Return clamp(mp_sum(a, b, t), -clip, clip) with mp_sum of EDM2, Eq. 88.

    mp_sum is ((1 - t) a + t b) / sqrt((1 - t)^2 + t^2). a, b and the result have the same shape, any shape.
    Errors: see the module. Saves one bit per element, or nothing without ``clip``.
    Bytes: forward 3 s + 1/8, backward 3 s + 1/8.
    """
    _check_sum(a, b, t, clip)
    a, b = _alike(a, b)
    if not compiled_for(a):
        return reference.sum_clamp(a, b, t, clip)
    out: Tensor = torch.ops.diffratio.sum_clamp(a, b, t, clip, False)[0]
    return out


def sum_clamp_silu(a: Tensor, b: Tensor, t: float, clip: float = math.inf) -> tuple[Tensor, Tensor]:
    """Return (y, mp_silu(y)) with y = ``sum_clamp(a, b, t, clip)``.

    Shapes and errors are those of :func:`sum_clamp`. Saves y and one bit per element.
    Bytes: forward 4 s + 1/8, backward 5 s + 1/8, both the minimum.
    """
    _check_sum(a, b, t, clip)
    a, b = _alike(a, b)
    if not compiled_for(a):
        return reference.sum_clamp_silu(a, b, t, clip)
    out, activated, _ = torch.ops.diffratio.sum_clamp(a, b, t, clip, True)
    return out, activated


def _check_sum(a: Tensor, b: Tensor, t: float, clip: float) -> None:
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {list(a.shape)} and {list(b.shape)}")
    _balance(t)
    if not clip > 0:
        raise ValueError(f"clip must be positive, got {clip}")


def cat_silu(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return (y, mp_silu(y)) with y = mp_cat(a, b, t), a and b concatenated: start of a decoder block.

    a [N, Ca, H, W], b [N, Cb, H, W], y [N, Ca + Cb, H, W]. The weight t of b does not depend on Cb (EDM2,
    Eq. 103). Errors: see the module. Saves y. Bytes: forward 3 s, backward 4 s, both the minimum.
    """
    _image("a", a)
    _image("b", b)
    if a.shape[0] != b.shape[0] or a.shape[2:] != b.shape[2:]:
        raise ValueError(
            f"a and b must agree but for their channels, got {list(a.shape)} and {list(b.shape)}"
        )
    if not a.shape[1] or not b.shape[1]:
        raise ValueError(f"a and b must have channels, got {list(a.shape)} and {list(b.shape)}")
    _balance(t)
    a, b = _alike(a, b)
    if not compiled_for(a):
        return reference.cat_silu(a, b, t)
    out, activated = torch.ops.diffratio.cat_silu(a, b, t)
    return out, activated


def ones_channel(x: Tensor, scale: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Concatenate scale x and a channel of ones: [N, C + 1, H, W] in ``dtype`` (default: that of x).

    x [N, C, H, W]. ``scale`` [N] is c_in of the preconditioning and is not differentiable. Errors: see the
    module. Saves scale.
    """
    _image("x", x)
    if tuple(scale.shape) != (len(x),) or scale.device != x.device:
        raise ValueError(f"scale must be [N] = [{len(x)}] on {x.device}, got {_describe(scale)}")
    dtype = dtype or x.dtype
    if not compiled_for(x) or dtype not in FLOATS:
        return reference.ones_channel(x, scale.detach(), dtype)
    out: Tensor = torch.ops.diffratio.ones_channel(x, scale.detach().float(), dtype)
    return out


def qkv_norm(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value [N, heads, tokens, size], normalized, from qkv [N, tokens, 3, heads, size].

    Each vector is divided by (1e-4 + its rms). Results are contiguous, in the dtype of qkv. Errors: see the
    module. Saves qkv. Bytes: forward 2 s, backward 3 s, both the minimum.
    """
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"qkv must be [N, tokens, 3, heads, size], got {_describe(qkv)}")
    _floating("qkv", qkv)
    if not compiled_for(qkv) or qkv.shape[4] > MAX_HEAD_SIZE:
        return reference.qkv_norm(qkv)
    query, key, value = torch.ops.diffratio.qkv_norm(qkv)
    return query, key, value


# Fake implementations for torch.compile, and gradients for autograd.


def _layout(x: Tensor) -> torch.memory_format:
    """The memory format in which the compiled code processes x: channels_last or contiguous."""
    if x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=_layout(x))


def _pair_like(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _like(x), _like(x)


def _pixel_norm_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0])


def _pixel_norm_backward(ctx: Any, by_normalized: Tensor | None, by_activated: Tensor | None) -> Tensor:
    (x,) = ctx.saved_tensors
    gradient: Tensor = torch.ops.diffratio.pixel_norm_silu_backward(x, by_normalized, by_activated)
    return gradient


def _scale_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, condition, rng, index, *ctx.rest = inputs
    ctx.save_for_backward(x, condition, rng, index)


def _scale_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    by_x, by_condition = torch.ops.diffratio.scale_silu_backward(gradient, *ctx.saved_tensors, *ctx.rest)
    return by_x, by_condition, None, None, None, None, None, None


def _sum_fake(a: Tensor, b: Tensor, t: float, clip: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    count = 0 if math.isinf(clip) else (a.numel() + 7) // 8
    return _like(a), _like(a) if silu else a.new_empty(0), a.new_empty(count, dtype=torch.uint8)


def _sum_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, _, ctx.t, ctx.clip, silu = inputs
    ctx.last = _layout(a) == torch.channels_last
    out, activated, passes = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*([passes] if silu else [activated, passes]))
    ctx.save_for_backward(out if silu else None, passes)


def _sum_backward(ctx: Any, by_out: Tensor | None, by_activated: Tensor | None, _: Any) -> tuple[Any, ...]:
    out, passes = ctx.saved_tensors
    if out is None:
        by_activated = None
    if by_out is None and by_activated is None:
        return None, None, None, None, None
    by_a, by_b = torch.ops.diffratio.sum_clamp_backward(
        by_out, by_activated, out, passes, ctx.t, ctx.clip, ctx.last
    )
    return by_a, by_b, None, None, None


def _sum_backward_fake(
    by_out: Tensor | None,
    by_activated: Tensor | None,
    out: Tensor | None,
    passes: Tensor,
    t: float,
    clip: float,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    like = by_out if out is None else out
    assert like is not None
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty_like(like, memory_format=layout), torch.empty_like(like, memory_format=layout)


def _silu_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _silu_backward(ctx: Any, gradient: Tensor) -> Tensor:
    by_x: Tensor = torch.ops.diffratio.mp_silu_backward(gradient, ctx.saved_tensors[0])
    return by_x


def _joined(a: Tensor, b: Tensor) -> torch.memory_format:
    last = torch.channels_last
    return last if last in (_layout(a), _layout(b)) else torch.contiguous_format


def _cat_fake(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    shape = (a.shape[0], a.shape[1] + b.shape[1], *a.shape[2:])
    out = torch.empty(shape, dtype=a.dtype, device=a.device, memory_format=_joined(a, b))
    return out, torch.empty_like(out)


def _cat_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    a, _, ctx.t = inputs
    ctx.first = a.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(output[0])


def _cat_backward(ctx: Any, by_out: Tensor | None, by_activated: Tensor | None) -> tuple[Any, ...]:
    (out,) = ctx.saved_tensors
    by_a, by_b = torch.ops.diffratio.cat_silu_backward(out, by_out, by_activated, ctx.first, ctx.t)
    return by_a, by_b, None


def _cat_backward_fake(
    out: Tensor, by_out: Tensor | None, by_activated: Tensor | None, first: int, t: float
) -> tuple[Tensor, Tensor]:
    def side(channels: int) -> Tensor:
        shape = (out.shape[0], channels, *out.shape[2:])
        return torch.empty(shape, dtype=out.dtype, device=out.device, memory_format=_layout(out))

    return side(first), side(out.shape[1] - first)


def _ones_fake(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (x.shape[0], x.shape[1] + 1, *x.shape[2:])
    return torch.empty(shape, dtype=dtype, device=x.device, memory_format=_layout(x))


def _ones_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, scale, _ = inputs
    ctx.dtype = x.dtype
    ctx.save_for_backward(scale)


def _ones_backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    (scale,) = ctx.saved_tensors
    return torch.ops.diffratio.ones_channel_backward(gradient, scale, ctx.dtype), None, None


def _ones_backward_fake(gradient: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    shape = (gradient.shape[0], gradient.shape[1] - 1, *gradient.shape[2:])
    return torch.empty(shape, dtype=dtype, device=gradient.device, memory_format=_layout(gradient))


def _qkv_fake(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    count, tokens, _, heads, size = qkv.shape
    query, key, value = (qkv.new_empty((count, heads, tokens, size)) for _ in range(3))
    return query, key, value


def _qkv_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _qkv_backward(ctx: Any, *gradients: Tensor) -> Tensor:
    (qkv,) = ctx.saved_tensors
    gradient: Tensor = torch.ops.diffratio.qkv_norm_backward(qkv, *gradients)
    return gradient


def _register() -> None:
    fakes = {
        "pixel_norm_silu": _pair_like,
        "pixel_norm_silu_backward": lambda x, *_: _like(x),
        "scale_silu": lambda x, *_: _like(x),
        "scale_silu_backward": lambda gradient, x, condition, *_: (
            _like(x), condition.new_empty(condition.shape),
        ),
        "sum_clamp": _sum_fake,
        "sum_clamp_backward": _sum_backward_fake,
        "mp_silu": _like,
        "mp_silu_backward": lambda gradient, x: _like(x),
        "cat_silu": _cat_fake,
        "cat_silu_backward": _cat_backward_fake,
        "ones_channel": _ones_fake,
        "ones_channel_backward": _ones_backward_fake,
        "qkv_norm": _qkv_fake,
        "qkv_norm_backward": lambda qkv, *_: qkv.new_empty(qkv.shape),
    }  # fmt: skip
    for name, fake in fakes.items():
        torch.library.register_fake(f"diffratio::{name}")(fake)
    derivatives: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
        "pixel_norm_silu": (_pixel_norm_backward, _pixel_norm_setup),
        "scale_silu": (_scale_backward, _scale_setup),
        "sum_clamp": (_sum_backward, _sum_setup),
        "mp_silu": (_silu_backward, _silu_setup),
        "cat_silu": (_cat_backward, _cat_setup),
        "ones_channel": (_ones_backward, _ones_setup),
        "qkv_norm": (_qkv_backward, _qkv_setup),
    }
    for name, (backward, setup) in derivatives.items():
        torch.library.register_autograd(f"diffratio::{name}", backward, setup_context=setup)


if HAS_OPERATIONS:
    _register()
