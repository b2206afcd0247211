"""The fused operations of a RatioMixer: its log ratio, the generator's gradient, the ratio network's loss.

``weights`` is the list of a RatioMixer's tensors in the order of ``weight_shapes`` (seven, or eight with an
energy head), float32, bfloat16 or float64; C channels, L layers, H hidden units, T patches of P numbers.
``conditioning`` has D = C + L H numbers per sample: a token bias and the hidden biases of the layers.
``reference_ratio`` has the formulas; docs/ratio_mixer.md explains them. Images are [B, channels, H, W] in
float32 or bfloat16, or float64 with float64 weights. Results are float32 (float64 for float64 images).
Gradients of weights have the dtype of the weights. Noise is that of ``ops.add_noise`` for the same (rng,
index, purpose, substep, draw).

``packed`` is the result of ``pack_weights`` for the same weights, if available. CUDA kernels round the
operands of matrix products to bfloat16 and sum in float32. They support at most 256 tokens, 256 channels and
64 numbers per patch. Other networks, and operations that do not fit the shared memory of the GPU, use the
reference on CUDA; a warning reports it once.

Wrong shapes, devices or dtypes raise ``ValueError`` or ``TypeError``. NaN in sigma raises
``ValueError`` on the CPU; on CUDA that sample becomes NaN. Source: arXiv 2502.08005.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from diffratio_fast.ops import compiled, reference_ratio
from diffratio_fast.ops import ratio_checks as checks
from diffratio_fast.ops.purpose import Purpose
from diffratio_fast.ops.ratio_checks import weight_shapes
from diffratio_fast.ops.ratio_scratch import cuda_packed_bytes
from diffratio_fast.ops.reference_ratio import RatioLoss, ScoreDifference

__all__ = [
    "RatioLoss",
    "ScoreDifference",
    "log_ratio",
    "pack_weights",
    "ratio_loss",
    "score_difference",
    "weight_shapes",
]


HAS_OPERATIONS = compiled.module is not None and hasattr(torch.ops.diffratio, "ratio_loss")


def _use_compiled(operation: str, weights: Sequence[Tensor], images: Tensor) -> bool:
    """Whether the compiled implementation is used.

    The reference is used for float64. On CUDA it is also used if no kernel exists for the network's shape or
    the kernel does not fit the shared memory of the GPU.
    """
    if not HAS_OPERATIONS or images.dtype == torch.float64:
        return False
    if images.device.type != "cuda":
        return images.device.type == "cpu"
    return _kernels_fit(operation, *checks.layout(weights, images), images.device.index or 0)


@torch.compiler.assume_constant_result  # has no effect on a cached function
def _kernels_fit(operation: str, *sizes_and_device: int) -> bool:
    """Whether the CUDA kernels of the operation support this ``Layout`` on this device; warn once if not."""
    return _fit_or_warn(operation, *sizes_and_device)


@functools.cache
def _fit_or_warn(operation: str, *sizes_and_device: int) -> bool:
    *sizes, device = sizes_and_device
    fit = getattr(compiled.module, "ratio_kernels_fit", None)
    if fit is not None and fit(operation, sizes, device):
        return True
    reason = "was built without CUDA" if fit is None else "has no kernel for it that fits this GPU"
    warnings.warn(
        f"{operation} of a RatioMixer of {sizes[4]} tokens and {sizes[5]} channels runs in plain PyTorch: "
        f"the compiled module {reason}",
        stacklevel=4,
    )
    return False


def pack_weights(weights: Sequence[Tensor]) -> Tensor | None:
    """Pack the weights of a RatioMixer for the CUDA kernels: bfloat16, in the order of use, one launch.

    Pass the result as ``packed``: a training step then packs once, not once per operation. Pack again after
    every change of a weight. Returns None for float64 and without compiled code for the device. The result
    is empty on the CPU, because the CPU implementation packs in each call. Errors: see the module.
    """
    if not HAS_OPERATIONS or weights[0].dtype == torch.float64:
        return None
    if weights[0].device.type == "cuda" and not hasattr(compiled.module, "ratio_kernels_fit"):
        return None
    packed: Tensor = torch.ops.diffratio.pack_weights([w.detach() for w in weights])
    return packed


def log_ratio(
    weights: Sequence[Tensor],
    noised: Tensor,
    sigma: Tensor,
    conditioning: Tensor,
    *,
    sigma_data: float = 0.5,
    packed: Tensor | None = None,
) -> Tensor:
    """The log ratio [B] of noised images [B, channels, H, W] at ``sigma`` [B] given ``conditioning`` [B, D].

    Differentiable with respect to weights, images and conditioning. Dtypes, errors and source: see the
    module.
    """
    inputs = (*weights, noised, conditioning)
    differentiated = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    if not _use_compiled("log_ratio_backward" if differentiated else "log_ratio", weights, noised):
        return reference_ratio.log_ratio(weights, noised, sigma, conditioning, sigma_data=sigma_data)
    sizes = checks.layout(weights, noised)
    sigma = checks.level("sigma", sigma, (noised.shape[0],), noised)
    e = checks.column("conditioning", conditioning, (noised.shape[0], sizes.conditioning), noised)
    return torch.ops.diffratio.log_ratio(list(weights), noised, sigma, e, sigma_data, packed)


def score_difference(
    weights: Sequence[Tensor],
    fake: Tensor,
    sigma: Tensor,
    conditioning: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    weight: Tensor,
    divergence: str = "reverse_kl",
    purpose: int = Purpose.NOISE_GENERATOR,
    substep: int = 0,
    sigma_data: float = 0.5,
    packed: Tensor | None = None,
) -> ScoreDifference:
    """The generator's gradient: gradient[b] = -(1/K) sum_k weight_bk h(l_bk) grad l(x_bk), without 1/B.

    ``fake`` [B, channels, H, W] is clean; ``sigma`` and ``weight`` are [B, K]; ``conditioning`` is [B, K, D].
    x_bk is fake[b] + sigma_bk eps with eps of draw k. h is that of ``divergence``
    (``diffratio_fast.divergences``), with the clamp inside h only. Returns gradient (like ``fake``) and
    log_ratio [B, K]; neither is differentiable. Dtypes, errors and source: see the module.
    """
    keywords: dict[str, Any] = {"weight": weight, "divergence": divergence, "purpose": purpose}
    if not _use_compiled("score_difference", weights, fake):
        return reference_ratio.score_difference(
            weights, fake, sigma, conditioning, rng, index, substep=substep, sigma_data=sigma_data, **keywords
        )
    checks.stream(fake, rng, index, [purpose], substep)
    sizes = checks.layout(weights, fake)
    if sigma.dim() != 2 or sigma.shape[1] == 0:
        raise ValueError(f"sigma must be [B, K] with K >= 1, got {list(sigma.shape)}")
    shape = (fake.shape[0], sigma.shape[1])
    sigma, weight = checks.level("sigma", sigma, shape, fake), checks.level("weight", weight, shape, fake)
    e = checks.column("conditioning", conditioning, (*shape, sizes.conditioning), fake)
    code = checks.divergence_code(divergence)
    constants = [w.detach() for w in weights]
    return ScoreDifference(
        *torch.ops.diffratio.score_difference(
            constants, fake.detach(), sigma, e.detach(), weight, rng, index, code, int(purpose), substep,
            sigma_data, packed,
        )
    )  # fmt: skip


def ratio_loss(
    weights: Sequence[Tensor],
    real: Tensor,
    fake: Tensor,
    sigma: Tensor,
    conditioning_real: Tensor,
    conditioning_fake: Tensor,
    rng: Tensor,
    index: Tensor,
    *,
    purposes: tuple[int, int] = (Purpose.NOISE_REAL, Purpose.NOISE_FAKE),
    substep: int = 0,
    sigma_data: float = 0.5,
    packed: Tensor | None = None,
) -> RatioLoss:
    """The loss mean softplus(-l_real) + mean softplus(l_fake) over B pairs, with its gradients.

    ``real`` and ``fake`` [B, channels, H, W] are clean. The images of a pair share ``sigma`` [B] and
    ``index`` int64 [B]. ``purposes`` are the noise purposes of the halves: ``ops.SEPARATE_NOISE``, or
    ``ops.SHARED_NOISE`` for one eps per pair. The conditionings are [B, D]. ``loss`` is differentiable with
    respect to weights and conditionings. Its backward multiplies the returned gradients by upstream; these
    are not differentiable. ``real`` and ``fake`` get no gradient. Dtypes, errors and source: see the module.
    """
    if not _use_compiled("ratio_loss", weights, real):
        return reference_ratio.ratio_loss(
            weights, real, fake, sigma, conditioning_real, conditioning_fake, rng, index,
            purposes=purposes, substep=substep, sigma_data=sigma_data,
        )  # fmt: skip
    checks.stream(real, rng, index, purposes, substep)
    sizes = checks.layout(weights, real)
    if fake.shape != real.shape or fake.dtype != real.dtype or fake.device != real.device:
        raise ValueError("real and fake must have one shape, dtype and device")
    batch = real.shape[0]
    if batch == 0:
        raise ValueError("the loss of no samples is not defined")
    sigma = checks.level("sigma", sigma, (batch,), real)
    first = checks.column("conditioning_real", conditioning_real, (batch, sizes.conditioning), real)
    second = checks.column("conditioning_fake", conditioning_fake, (batch, sizes.conditioning), real)
    loss, real_half, fake_half, gradients, *by_conditioning = torch.ops.diffratio.ratio_loss(
        list(weights), real.detach(), fake.detach(), sigma, first, second, rng, index,
        [int(p) for p in purposes], substep, sigma_data, packed,
    )  # fmt: skip
    return RatioLoss(loss, real_half, fake_half, gradients, (by_conditioning[0], by_conditioning[1]))


# Fake implementations for torch.compile, and gradients for autograd.


def _log_ratio_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    weights, noised, sigma, conditioning, ctx.sigma_data, packed = inputs
    ctx.save_for_backward(noised, sigma, conditioning, packed, *weights)


def _log_ratio_backward(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    noised, sigma, conditioning, packed, *weights = ctx.saved_tensors
    by_image, by_weights, by_conditioning = torch.ops.diffratio.log_ratio_backward(
        upstream, weights, noised, sigma, conditioning, ctx.sigma_data, packed
    )
    return list(by_weights), by_image, None, by_conditioning, None, None


def _ratio_loss_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, real_half, fake_half, by_weights, by_real, by_fake = output
    ctx.count = len(by_weights)
    ctx.save_for_backward(*by_weights, by_real, by_fake)
    ctx.mark_non_differentiable(real_half, fake_half, *by_weights, by_real, by_fake)


def _ratio_loss_backward(ctx: Any, upstream: Tensor, *others: Any) -> tuple[Any, ...]:
    *by_weights, by_real, by_fake = (upstream.to(g.dtype) * g for g in ctx.saved_tensors)
    return by_weights, None, None, None, by_real, by_fake, None, None, None, None, None, None


def _like(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.new_empty(tensor.shape) for tensor in tensors]


def _packed_like(weights: Sequence[Tensor]) -> Tensor:
    """Fake result of ``pack_weights``: empty on the CPU."""
    first = weights[0]
    if first.device.type != "cuda":
        return first.new_empty(0, dtype=torch.uint8)
    return first.new_empty(cuda_packed_bytes(weights), dtype=torch.uint8)


def forward_flops(weights: Sequence[Sequence[int]]) -> int:
    """Floating-point operations in the matrix products of one log ratio, from the shapes of the weights."""
    (width, patch), (tokens, _) = weights[0], weights[1]
    depth, hidden, _ = weights[4]
    energy = patch if len(weights) == len(checks.NAMES) else 0
    return 2 * tokens * width * (patch + depth * (tokens + 2 * hidden) + energy)


def _register_flops() -> None:
    """Register FLOP formulas: the image gradient costs one more forward, all gradients two more."""
    counted = {
        "log_ratio": lambda weights, noised, *_, **__: noised[0] * forward_flops(weights),
        "log_ratio_backward": lambda g, weights, *_, **__: 3 * g[0] * forward_flops(weights),
        "score_difference": lambda weights, fake, sigma, *_, **__: (
            2 * sigma[0] * sigma[1] * forward_flops(weights)
        ),
        "ratio_loss": lambda weights, real, *_, **__: 6 * real[0] * forward_flops(weights),
    }
    for name, formula in counted.items():
        register_flop_formula(getattr(torch.ops.diffratio, name))(formula)


def _register() -> None:
    library = torch.library
    library.register_fake("diffratio::pack_weights")(_packed_like)
    library.register_fake("diffratio::log_ratio")(
        lambda weights, noised, sigma, *rest: sigma.new_empty(sigma.shape)
    )
    library.register_fake("diffratio::log_ratio_backward")(
        lambda upstream, weights, noised, sigma, conditioning, *rest: (
            noised.new_empty(noised.shape), _like(weights), conditioning.new_empty(conditioning.shape),
        )
    )  # fmt: skip
    library.register_fake("diffratio::score_difference")(
        lambda weights, fake, sigma, *rest: (
            fake.new_empty(fake.shape, dtype=torch.float32),
            sigma.new_empty(sigma.shape),
        )
    )  # fmt: skip
    library.register_fake("diffratio::ratio_loss")(
        lambda weights, real, fake, sigma, first, second, *rest: (
            sigma.new_empty(()), sigma.new_empty(sigma.shape), sigma.new_empty(sigma.shape), _like(weights),
            first.new_empty(first.shape), second.new_empty(second.shape),
        )
    )  # fmt: skip
    library.register_autograd("diffratio::log_ratio", _log_ratio_backward, setup_context=_log_ratio_setup)
    library.register_autograd("diffratio::ratio_loss", _ratio_loss_backward, setup_context=_ratio_loss_setup)


if HAS_OPERATIONS:
    _register()
    _register_flops()
