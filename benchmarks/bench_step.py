"""A training iteration with a RatioMixer: fused operations compared with the same formulas under autograd."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import Case, Settings
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.scaling import EDM_PIXELS
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.ops import reference_ratio
from diffratio_fast.training.state.generator import initial_state
from diffratio_fast.training.step.generator import Iteration

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {
        "digits": {"shape": (1, 8, 8), "batch_size": 128, "ratio_width": 64, "ratio_depth": 4},
        "32x32": {"shape": (3, 32, 32), "batch_size": 32, "ratio_width": 64, "ratio_depth": 4},
    },
    "cuda": {
        "32x32": {"shape": (3, 32, 32), "batch_size": 512, "ratio_width": 128, "ratio_depth": 4},
    },
}


def iteration(settings: Settings, shape: tuple[int, int, int], **options: Any) -> Iteration:
    """Training of an MLP generator with a RatioMixer on random images of ``shape``."""
    precision = "bfloat16" if settings.device.type == "cuda" else "float32"
    config = TrainConfig(
        ratio_network="mixer", generator="mlp", generator_width=256, generator_depth=3, latent_size=64,
        precision=precision, **options,
    )  # fmt: skip
    dataset: Any = SimpleNamespace(
        name="random", kind="image", shape=shape, scaling=EDM_PIXELS, class_names=tuple("0123456789")
    )
    return Iteration(config, EDM_PIXELS, initial_state(config, dataset, settings.device), settings.device)


def without_operations(iteration: Iteration, compiled: bool) -> Iteration:
    """The same iteration with the network's formulas in plain PyTorch."""
    mixer = iteration.mixer
    assert isinstance(mixer, RatioMixer)
    function = reference_ratio.log_ratio
    if compiled:
        function = torch.compile(function, dynamic=False)

    def ratio(noised: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=noised.device.type == "cuda"):
            return function(
                mixer.weights(), noised, sigma, mixer.conditioning(sigma, labels), sigma_data=mixer.sigma_data
            )

    iteration.mixer, iteration.ratio = None, ratio
    return iteration


def cases(settings: Settings) -> Iterator[Case]:
    for name, size in SIZES[settings.device.type].items():
        torch._dynamo.reset()
        yield case(settings, name, **size)


def case(settings: Settings, name: str, shape: tuple[int, int, int], **options: Any) -> Case:
    batch = options["batch_size"]
    records = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=settings.device)
    labels = torch.arange(batch, device=settings.device) % 10
    iterations = {
        "fused": iteration(settings, shape, **options),
        "eager": without_operations(iteration(settings, shape, **options), compiled=False),
        "compile": without_operations(iteration(settings, shape, **options), compiled=True),
    }

    def stepping(which: Iteration) -> Callable[[int], None]:
        return lambda i: which.run([(records, labels)])

    def check() -> None:
        """Assert that one step of each from the same state gives the same weights."""
        weights = []
        for which in (iterations["fused"], iterations["eager"]):
            which.run([(records, labels)])
            parameters = [*which.state.ratio.parameters(), *which.state.generator.parameters()]
            weights.append(torch.cat([p.detach().double().flatten() for p in parameters]))
        error = float((weights[0] - weights[1]).norm() / weights[1].norm())
        allowed = 1e-3 if settings.device.type == "cpu" else 3e-2
        assert error < allowed, f"a training step with fused operations differs by {error:.1e}"

    width, depth = options["ratio_width"], options["ratio_depth"]
    label = f"{name}: B={batch}, {'x'.join(map(str, shape))}, C={width}, L={depth}"
    number_type = "float32" if settings.device.type == "cpu" else "bfloat16"
    providers = {key: stepping(value) for key, value in iterations.items()}
    return Case("training step", label, number_type, "full", providers, check, 2.0 * records.numel() * 4)
