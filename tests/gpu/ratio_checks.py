"""Checks of the CUDA ratio operations. Plain functions that need only torch: pytest collects them through
test_ratio_cuda.py, and ``python -m benchmarks.gpu_checks`` runs them without pytest.

Tolerance: an error is the norm of the difference from the float64 reference over the norm of that, of three
problems together, so that it does not depend on a single number. It is at most twice the error of the same
formulas in PyTorch with bfloat16 matrix products, plus rounding.

``DEVICE`` may be set to the CPU: then all but ``CUDA_ONLY`` compare the C++ operations, to try the checks.
"""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.ops import compiled, ratio, reference_ratio
from diffratio_fast.ops.ratio import weight_shapes

DEVICE = torch.device("cuda")
SEEDS = (0, 1, 2)
FEW = 64
OPERATIONS = ("log_ratio", "log_ratio_backward", "score_difference", "ratio_loss")
"""Results with fewer elements than this, such as losses, have the tolerance ``ROUNDING_OF_FEW``."""
ROUNDING, ROUNDING_OF_FEW = 2e-3, 1e-2

# channels, height, width of the image, patch, channels C, blocks, hidden units
SHAPES = {
    "digits": (1, 8, 8, 2, 64, 2, 128),
    "odd": (3, 10, 6, 2, 40, 2, 50),
    "fashion": (1, 32, 32, 4, 64, 2, 128),
    "65 tokens": (2, 26, 10, 2, 64, 1, 96),
    "129 tokens": (1, 43, 3, 1, 128, 2, 256),
    "CIFAR-10": (3, 32, 32, 2, 128, 4, 256),
    "ImageNet-64": (3, 64, 64, 4, 64, 3, 256),
    "latents": (4, 64, 64, 4, 128, 2, 512),
    "256 channels": (4, 32, 32, 4, 256, 2, 512),
    "256 channels and tokens": (4, 64, 64, 4, 256, 2, 512),
}

MANY = ("digits", "CIFAR-10", "latents")
"""Shapes that are also tried with many samples."""


class Problem:
    """One network, images, conditioning; all on ``DEVICE``, float32."""

    def __init__(self, name: str, batch: int = 5, draws: int = 2, seed: int = 0) -> None:
        channels, height, image_width, patch, width, depth, hidden = SHAPES[name]
        tokens = (height // patch) * (image_width // patch)
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE)

        shapes = weight_shapes(tokens, width, depth, hidden, channels * patch**2)
        self.weights = [normal(*shape) / shape[-1] ** 0.5 for shape in shapes.values()]
        self.weights[-1] /= tokens**0.5
        self.real, self.fake = normal(2, batch, channels, height, image_width).unbind()
        self.sigma = torch.rand(batch, draws, generator=generator).to(DEVICE) * 2 + 0.05
        self.weight = self.sigma**2
        self.conditioning = normal(batch, draws, width + depth * hidden) * 0.5
        self.rng, self.index = (
            ops.make_rng(-3, 2**33 + 7).to(DEVICE),
            torch.arange(batch).to(DEVICE) * 5 + 2**31,
        )
        self.upstream = normal(batch)

    def cast(self, dtype: torch.dtype) -> Problem:
        """The same in another dtype, except rng and index."""
        other = object.__new__(Problem)
        for name, value in vars(self).items():
            if isinstance(value, list):
                value = [w.to(dtype) for w in value]
            other.__dict__[name] = value.to(dtype) if getattr(value, "is_floating_point", bool)() else value
        return other


def log_ratio(p: Problem, module: Any) -> list[Tensor]:
    return [module.log_ratio(p.weights, p.real, p.sigma[:, 0], p.conditioning[:, 0])]


def log_ratio_gradients(p: Problem, module: Any) -> list[Tensor]:
    weights = [w.clone().requires_grad_() for w in p.weights]
    x, e = p.real.clone().requires_grad_(), p.conditioning[:, 0].clone().requires_grad_()
    value = module.log_ratio(weights, x, p.sigma[:, 0], e)
    return list(torch.autograd.grad(value, [x, e, *weights], p.upstream.to(value.dtype)))


def score_difference(p: Problem, module: Any, divergence: str = "jensen_shannon") -> list[Tensor]:
    outcome = module.score_difference(
        p.weights, p.fake, p.sigma, p.conditioning, p.rng, p.index, weight=p.weight, divergence=divergence
    )
    return [outcome.gradient, outcome.log_ratio]


def ratio_loss(p: Problem, module: Any) -> list[Tensor]:
    e = p.conditioning
    outcome = module.ratio_loss(p.weights, p.real, p.fake, p.sigma[:, 0], e[:, 0], e[:, -1], p.rng, p.index)
    return [
        outcome.loss,
        outcome.log_ratio_real,
        outcome.log_ratio_fake,
        *outcome.weight_gradients,
        *outcome.conditioning_gradients,
    ]


Operation = Callable[[Problem, Any], list[Tensor]]
OPERATIONS: tuple[Operation, ...] = (log_ratio, log_ratio_gradients, score_difference, ratio_loss)


def error_of(got: list[Tensor], exact: list[Tensor]) -> float:
    """The norm of the differences over the norm of the exact values."""
    differences = torch.stack([(a.double() - b).norm() for a, b in zip(got, exact, strict=True)])
    sizes = torch.stack([b.double().norm() for b in exact])
    return float(differences.norm() / sizes.norm().clamp_min(1e-30))


def compare(make: Callable[[int], Problem], operation: Operation) -> None:
    """An operation on ``make(seed)`` against the reference, all its results over all ``SEEDS``."""
    results: list[tuple[list[Tensor], list[Tensor], list[Tensor]]] = []
    for seed in SEEDS:
        p = make(seed)
        got = operation(p, ops)
        exact = operation(p.cast(torch.float64), reference_ratio)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            usual = operation(p, reference_ratio)
        results.append((got, exact, usual))
    for i in range(len(results[0][0])):
        a, b, c = ([result[which][i] for result in results] for which in range(3))
        assert not any(x.isnan().any() for x in a), f"{operation.__name__}, result {i}: NaN"
        rounding = ROUNDING if sum(x.numel() for x in a) >= FEW else ROUNDING_OF_FEW
        error, allowed = error_of(a, b), 2 * error_of(c, b) + rounding
        assert error <= allowed, f"{operation.__name__}, result {i}: error {error:.1e}, allowed {allowed:.1e}"


def has_kernels(p: Problem) -> bool:
    """Whether the compiled operations support this network on this device."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return all(ratio._use_compiled(name, p.weights, p.real) for name in OPERATIONS)


@contextlib.contextmanager
def form(name: str, workspace_bytes: int) -> Iterator[None]:
    choose = getattr(compiled.module, "use_ratio_loss_form", lambda *_: None)  # CUDA builds have it
    choose(name, workspace_bytes)
    try:
        yield
    finally:
        choose("automatic", 256 << 20)


def same(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def check_the_kernels_are_used() -> None:
    """Every shape on a GPU with the shared memory of an H100; on any GPU the smallest."""
    memory = 227 * 1024  # of an H100
    if DEVICE.type == "cuda":
        memory = torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin
    expected = list(SHAPES) if memory >= 227 * 1024 else ["digits", "odd"]
    without = [name for name in expected if not has_kernels(Problem(name, 1))]
    assert not without, f"no kernels for {', '.join(without)} with {memory} bytes of shared memory"


def check_parity() -> None:
    for name, operation in itertools.product(SHAPES, OPERATIONS):
        compare(lambda seed: Problem(name, seed=seed), operation)  # noqa: B023


def check_divergences() -> None:
    for divergence in DIVERGENCES:

        def difference(p: Problem, module: Any, divergence: str = divergence) -> list[Tensor]:
            return score_difference(p, module, divergence)

        compare(lambda seed: Problem("CIFAR-10", draws=3, seed=seed), difference)


def check_many_samples() -> None:
    """More units than thread blocks, in several slices, in both forms; results are deterministic."""
    for name in MANY:

        def make(seed: int, name: str = name) -> Problem:
            return Problem(name, batch=200, seed=seed)

        p = make(0)
        for how, workspace in itertools.product(("one launch", "several"), (256 << 20, 24 << 20)):
            with form(how, workspace):
                compare(make, ratio_loss)
                same(ratio_loss(p, ops), ratio_loss(p, ops))
        compare(make, score_difference)
        same(score_difference(p, ops), score_difference(p, ops))


def check_bfloat16_images_and_weights() -> None:
    p = Problem("CIFAR-10").cast(torch.bfloat16)
    for operation in (log_ratio, score_difference, ratio_loss):
        for a, b in zip(operation(p, ops), operation(p.cast(torch.float64), reference_ratio), strict=True):
            error = error_of([a], [b])
            assert error < 3e-2, f"{operation.__name__}: error {error:.1e}"


def check_packed_weights() -> None:
    p = Problem("CIFAR-10")
    packed = ops.pack_weights(p.weights)
    arguments = (p.weights, p.real, p.sigma[:, 0], p.conditioning[:, 0])
    same([ops.log_ratio(*arguments, packed=packed)], [ops.log_ratio(*arguments)])


def check_nan_sigma_stays_in_its_sample() -> None:
    p = Problem("CIFAR-10")
    p.sigma[1, 0] = float("nan")
    gradient, values = score_difference(p, ops)
    assert values[1, 0].isnan() and not values[[0, 2, 3, 4]].isnan().any() and not values[1, 1].isnan()
    assert gradient[1].isnan().any() and not gradient[[0, 2, 3, 4]].isnan().any()


def check_other_networks_take_the_other_way() -> None:
    """A network that no GPU has kernels for runs in plain PyTorch, with one warning."""
    SHAPES["320 channels"] = (3, 16, 16, 2, 320, 1, 256)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            compare(lambda seed: Problem("320 channels", 2, seed=seed), log_ratio)
        assert any("plain PyTorch" in str(w.message) for w in caught), "no warning"
    finally:
        del SHAPES["320 channels"]


def check_graph_replay() -> None:
    """A captured graph reads the seed and step of its replay, and the current weights."""
    p = Problem("CIFAR-10", batch=16)
    for operation in (score_difference, ratio_loss):
        operation(p, ops)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = operation(p, ops)
        for step in (1, 5):
            p.rng.copy_(ops.make_rng(7, step))
            p.weights[4] *= 1.01
            graph.replay()
            torch.cuda.synchronize()
            same(out, operation(p, ops))


def check_no_synchronization() -> None:
    p = Problem("CIFAR-10")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for operation in (log_ratio, score_difference, ratio_loss):
            operation(p, ops)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_compiles() -> None:
    p = Problem("digits")
    got = torch.compile(lambda: score_difference(p, ops), fullgraph=True)()
    same(got, score_difference(p, ops))


CHECKS = [value for name, value in list(globals().items()) if name.startswith("check_")]
CUDA_ONLY = (
    check_other_networks_take_the_other_way, check_graph_replay,
    check_no_synchronization, check_nan_sigma_stays_in_its_sample,
)  # fmt: skip
