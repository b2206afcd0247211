"""Cost of an iteration by method: DiffRatio with a RatioMixer or a U-Net encoder, score distillation.

All use the same U-Net generator; teacher and student of score distillation have the same size.
``python -m benchmarks --only methods`` times whole training steps on this machine; ``python -m
benchmarks.bench_methods`` prints FLOPs and memory at the presets' own sizes, computed without a device.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.harness import Case, Settings
from diffratio_fast import command
from diffratio_fast.config.objectives import OBJECTIVES
from diffratio_fast.config.presets import PRESETS, RATIO_NETWORKS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.scaling import EDM_PIXELS
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.memory import Tracker, cost
from diffratio_fast.training.plan import planned_data
from diffratio_fast.training.step.generator import Iteration

CHOICES: dict[str, dict[str, Any]] = {
    "DiffRatio, mixer": {"ratio_network": "mixer"},
    "DiffRatio, encoder": {"ratio_network": "encoder"},
    "score distillation": {"objective": "vsd", "teacher": "none is read"},
}
PASSES: dict[str, dict[str, tuple[int, int]]] = {
    "DiffRatio, mixer": {"generator": (1, 1), "ratio network": (3, 3)},
    "DiffRatio, encoder": {"generator": (1, 1), "ratio network": (3, 3)},
    "score distillation": {"generator": (1, 1), "student": (2, 1), "teacher": (1, 0)},
}
"""Forward and backward passes of an image in an iteration with one ratio step and one noise level."""

SMALL = json.dumps({"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]})
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "cpu": {"16x16": {"shape": (3, 16, 16), "batch_size": 16, "backbone_options": SMALL, "ratio_width": 64}},
    "cuda": {
        "cifar10": {"preset": "cifar10", "shape": (3, 32, 32), "batch_size": 128},
        "imagenet512-xs": {"preset": "imagenet512-xs", "shape": (4, 64, 64), "batch_size": 32},
    },
}
PLANNED = ("cifar10", "imagenet512-xs")


def config_of(method: str, preset: str | None = None, **options: Any) -> TrainConfig:
    """The configuration of a method, with the networks of a preset or of ``options``."""
    values: dict[str, Any] = {"generator": "backbone", "device": "cpu"}
    if preset is not None:
        chosen = CHOICES[method]
        values |= PRESETS[preset] | RATIO_NETWORKS.get((preset, chosen.get("ratio_network", "")), {})
        values |= OBJECTIVES[chosen.get("objective", "diffratio")].preset
    return TrainConfig(**(values | CHOICES[method] | options))


def iteration(method: str, device: torch.device, shape: tuple[int, int, int], **options: Any) -> Iteration:
    config = config_of(method, **options)
    dataset: Any = SimpleNamespace(
        name="random", kind="image", shape=shape, scaling=EDM_PIXELS, class_names=tuple("0123456789")
    )
    found = Trainer.new_iteration(config, dataset, device, init=False)
    found.state.step = config.settled_step
    return found


def counted_flops(step: Callable[[], None]) -> int:
    """Of matrix products, convolutions and attention, by the formulas of torch's ``FlopCounterMode``.

    That mode itself cannot see into a step that asks for gradients in the midst of it.
    """
    with Tracker() as tracker:
        step()
    return tracker.flops


def cases(settings: Settings) -> Iterator[Case]:
    for name, size in SIZES[settings.device.type].items():
        yield case(settings, name, **size)


def case(settings: Settings, name: str, shape: tuple[int, int, int], **options: Any) -> Case:
    batch = options["batch_size"]
    options.setdefault("micro_batch", None)
    records = torch.randint(0, 256, (batch, *shape), dtype=torch.uint8, device=settings.device)
    labels = torch.arange(batch, device=settings.device) % 10
    iterations = {method: iteration(method, settings.device, shape, **options) for method in CHOICES}

    def stepping(which: Iteration) -> Callable[[int], None]:
        return lambda i: which.run([(records, labels)])

    providers = {method: stepping(which) for method, which in iterations.items()}
    about = {}
    for method, which in iterations.items():
        flops = counted_flops(lambda method=method: providers[method](0))  # type: ignore[misc]
        parameters = sum(p.numel() for p in which.state.ratio.parameters())
        about[method] = {
            "passes": PASSES[method],
            "flops": flops,
            "images": batch,
            "online_parameters": parameters,
            "teacher_parameters": sum(
                p.numel() for p in (which.state.teacher or torch.nn.Module()).parameters()
            ),
            "generator_parameters": sum(p.numel() for p in which.state.generator.parameters()),
        }
        settings.notes.append(
            f"{name}, {method}: {flops / batch / 1e9:.3g} GFLOP an image, online network of {parameters:,}"
        )

    def check() -> None:
        """A step moves generator and online network, and only to finite weights."""
        for method, which in iterations.items():
            before = [
                p.detach().clone()
                for p in (*which.state.generator.parameters(), *which.state.ratio.parameters())
            ]
            which.run([(records, labels)])
            after = [*which.state.generator.parameters(), *which.state.ratio.parameters()]
            moved = [float((a - b).detach().norm()) for a, b in zip(after, before, strict=True)]
            assert all(math.isfinite(size) for size in moved) and sum(moved) > 0, f"{method} makes no step"

    label = f"{name}: B={batch}, {'x'.join(map(str, shape))}"
    number_type = iterations["score distillation"].config.precision
    moved = 2.0 * records.numel() * 4
    return Case("training step by method", label, number_type, "full", providers, check, moved, about=about)


def planned() -> Iterator[dict[str, Any]]:
    """FLOPs and memory of a step at the sizes of the presets, with fake tensors."""
    for preset in PLANNED:
        for method in CHOICES:
            config = config_of(method, preset)
            found = cost(config, planned_data(preset, config)[0])
            yield {
                "preset": preset, "method": method, "batch": config.batch_size,
                "passes": PASSES[method], "parameters": found.parameters,
                "gflops_per_image": found.flops / config.batch_size / 1e9,
                "peak_gib": found.peak / 2**30, "state_gib": found.state / 2**30,
                "activations_gib": found.activations / 2**30,
            }  # fmt: skip


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.bench_methods", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    options = parser.parse_args(argv)
    rows = []
    print("| preset | method | online network, M | GFLOPs an image | memory, GiB | of that state |")
    print("|---|---|---|---|---|---|")
    for row in planned():
        rows.append(row)
        online = [count for name, count in row["parameters"].items() if name != "generator"]
        memory = f"{row['peak_gib']:.1f} | {row['state_gib']:.1f}"
        cells = f"{online[0] / 1e6:.1f} | {row['gflops_per_image']:,.1f} | {memory}"
        print(f"| `{row['preset']}` | {row['method']} | {cells} |", flush=True)
    if options.json is not None:
        replace_file(options.json, json.dumps({"torch": torch.__version__, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    command.run(main)
