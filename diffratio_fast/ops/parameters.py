"""Fused parameter operations of a training step: weight normalization, and Adam with averages.

EDM2 normalizes the weights of each output when they are used and, in training, also the stored weights
(Karras et al. 2024, arXiv 2312.02696, Section 2.3, Eq. 47 and 66). One pass over memory reads gradient,
weight, moments and averages once and writes them once. ``ops.reference_parameters`` is the definition.
Tensors are float32; other dtypes use the reference. A row is weight[i], the weights of one output. If tensors
are sharded along their first dimension (FSDP2), each process has complete rows and passes its own rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffratio_fast.ops import compiled
from diffratio_fast.ops import reference_parameters as reference

HAS_OPERATIONS = compiled.module is not None and hasattr(torch.ops.diffratio, "adam_step")
HAS_CUDA = HAS_OPERATIONS and torch._C._dispatch_has_kernel_for_dispatch_key("diffratio::adam_step", "CUDA")
MAX_AVERAGES = 4


def compiled_for(weight: Tensor) -> bool:
    """Whether the fused operations have compiled code for a tensor of this device and type."""
    kind = weight.device.type
    return (
        HAS_OPERATIONS and weight.dtype == torch.float32 and (kind == "cpu" or (kind == "cuda" and HAS_CUDA))
    )


def normalize_weight(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Divide each row of ``weight`` by (1e-4 + its rms) sqrt(its length).

    weight [out, in, ...] is floating point. The result has its shape and ``dtype`` (default: that of weight).
    Differentiable; saves weight. Raises ``ValueError`` for a vector or scalar and ``TypeError`` for integers.
    Source: EDM2, Eq. 47. Bytes per element to bfloat16: forward 6, backward 10, both the minimum.
    """
    if weight.dim() < 2:
        raise ValueError(f"weight must be [out, in, ...], got {list(weight.shape)}")
    if not weight.is_floating_point():
        raise TypeError(f"weight must be floating point, got {weight.dtype}")
    dtype = dtype or weight.dtype
    if not compiled_for(weight) or dtype == torch.float64:
        return reference.normalize_weight(weight, dtype)
    normalized: Tensor = torch.ops.diffratio.normalize_weight(weight, dtype)
    return normalized


class _Known(torch.autograd.Function):
    """``normalize_weight`` with a value that was computed before."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, normalized: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return normalized.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return torch.ops.diffratio.normalize_weight_backward(gradients[0], ctx.saved_tensors[0]), None


def known_normalized(weight: Tensor, normalized: Tensor) -> Tensor:
    """Return ``normalized`` with the gradient of ``normalize_weight(weight)``, which it must equal."""
    known: Tensor = _Known.apply(weight, normalized)
    return known


def adam_step(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    first: Sequence[Tensor],
    second: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    rate: float | Tensor,
    beta1: float,
    beta2: float,
    eps: float = 1e-8,
    decay: float = 0.0,
    decoupled: bool = True,
    averages: Sequence[tuple[Sequence[Tensor], float | Tensor]] = (),
    normalize: Sequence[bool] | None = None,
    normalized: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """Apply one step of AdamW (``decoupled``) or Adam in place; return squared gradient norms [count].

    ``weights``, ``gradients``, ``first`` and ``second`` (moments) are lists of ``count`` float32 tensors.
    ``steps``: one float32 number per tensor, the number of updates including this one. ``averages``: at most
    ``MAX_AVERAGES`` pairs (tensors like the weights, a share in [0, 1]): average += share (weight - average),
    with the updated weight. Weights marked in ``normalize`` are then divided by the rms of their rows (EDM2,
    Eq. 66). A tensor in ``normalized`` gets ``normalize_weight`` of the result, in its own dtype. ``rate``
    and the shares may be tensors on the device; a captured graph then reads them. A squared norm is not
    finite if its gradient is not.

    Bytes per element: 32 (gradient, weight, two moments), 8 per average and 2 for a bfloat16 normalized
    weight: the minimum. Only the tensors in the lists change. There is no synchronization with the device.
    Raises ``ValueError`` or ``TypeError`` for wrong lists, shapes, layouts, devices or dtypes.
    """
    flags = [bool(on) for on in normalize] if normalize is not None else [False] * len(weights)
    targets = list(normalized) if normalized is not None else [None] * len(weights)
    if len(averages) > MAX_AVERAGES:
        raise ValueError(f"at most {MAX_AVERAGES} averages, got {len(averages)}")
    if not weights:
        raise ValueError("there are no weights")
    if not all(compiled_for(w) for w in weights):
        return reference.adam_step(
            weights, gradients, first, second, steps, rate=rate, beta1=beta1, beta2=beta2, eps=eps,
            decay=decay, decoupled=decoupled, averages=averages, normalize=flags, normalized=targets,
        )  # fmt: skip
    nothing = weights[0].new_empty(0)
    shares = [share for _, share in averages]
    in_memory = [share for share in shares if isinstance(share, Tensor)]
    if in_memory and len(in_memory) < len(shares):
        raise ValueError("shares of averages must be all numbers or all tensors")
    squares: Tensor = torch.ops.diffratio.adam_step(
        list(weights), list(gradients), list(first), list(second), list(steps),
        [tensor for tensors, _ in averages for tensor in tensors],
        [nothing if target is None else target for target in targets],
        list(map(int, flags)),
        0.0 if isinstance(rate, Tensor) else rate, rate if isinstance(rate, Tensor) else None,
        [0.0 if isinstance(share, Tensor) else share for share in shares], in_memory,
        beta1, beta2, eps, decay, decoupled,
    )  # fmt: skip
    return squares


# Fake implementations for torch.compile, and gradients for autograd.


def _dense_like(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    last = weight.dim() == 4 and not weight.is_contiguous()
    last = last and weight.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty_like(weight, dtype=dtype, memory_format=layout)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0])


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
    return torch.ops.diffratio.normalize_weight_backward(gradient, ctx.saved_tensors[0]), None


def _register() -> None:
    library = torch.library
    library.register_fake("diffratio::normalize_weight")(_dense_like)
    library.register_fake("diffratio::normalize_weight_backward")(
        lambda gradient, weight: _dense_like(weight)
    )
    library.register_fake("diffratio::adam_step")(lambda weights, *rest: weights[0].new_empty(len(weights)))
    library.register_autograd("diffratio::normalize_weight", _backward, setup_context=_setup)


if HAS_OPERATIONS:
    _register()
