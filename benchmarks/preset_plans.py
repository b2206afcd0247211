"""The table of docs/presets.md: cost of every preset, and training speed of presets that fit a CPU.

    python -m benchmarks.preset_plans [PRESET ...] [--measured FILE]
    python -m benchmarks.preset_plans --measure FILE

Parameters, FLOPs and memory are those of ``--dry-run``, which computes nothing. ``--measure`` times steps of
small and reduced presets on one thread and random images, and writes a JSON file; ``--measured`` reads it
into the table.

Images per second refer to CPU time of the process on a CPU, which is nearly independent of other load, and to
wall time on a GPU.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment
from diffratio_fast import command
from diffratio_fast.config.presets import PRESETS, PRETRAIN_PRESETS
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.devices import choose_device
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.training.kinds import KINDS
from diffratio_fast.training.memory import cost
from diffratio_fast.training.plan import planned_data
from diffratio_fast.training.step.stepper import Batch

COLUMNS = (
    "preset", "command", "parameters, M", "batch (part)", "GFLOPs an image", "memory, GiB", "of that state",
    "images/s",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"
WARMUP, TIMED = 2, 10
LARGEST = {"cpu": 5e11, "cuda": 1e15}
"""Maximum FLOPs of a step to time, by device."""
REDUCED: dict[str, tuple[str, dict[str, Any]]] = {
    "cifar10-cond, reduced": (
        "cifar10-cond",
        {
            "backbone_options": '{"model_channels": 32, "channel_mult": [1, 2, 2], "num_blocks": 1}',
            "batch_size": 32,
            "precision": "float32",
        },
    ),
}
"""Additional rows: a preset and its changed options."""


def configurations(name: str) -> tuple[str, list[RunConfig]]:
    """The preset of a row, and its two configurations."""
    preset, options = REDUCED.get(name, (name, {}))
    return preset, [
        PretrainConfig(**(PRETRAIN_PRESETS[preset] | options)),
        TrainConfig(**(PRESETS[preset] | options)),
    ]


def command_of(config: RunConfig) -> str:
    return "train" if isinstance(config, TrainConfig) else "pretrain"


def row(name: str, preset: str, config: RunConfig, measured: dict[tuple[str, str], float]) -> str:
    found = cost(config, planned_data(preset, config)[0])
    parameters = " + ".join(f"{count / 1e6:.2f}" for count in found.parameters.values())
    size = f"{config.batch_size}" + (f" ({config.micro_batch})" if config.micro_batch else "")
    rate = measured.get((name, command_of(config)))
    state = (found.state + found.gradients) / 2**30
    return (
        f"| `{name}` | `{command_of(config)}` | {parameters} | {size} "
        f"| {found.flops / config.batch_size / 1e9:,.2f} | {found.peak / 2**30:.2f} | {state:.2f} "
        f"| {images_per_second(rate)} |"
    )


def images_per_second(rate: float | None) -> str:
    if rate is None:
        return "not measured"
    return f"{rate:,.0f}" if rate >= 100 else f"{rate:.3g}"


def stepper(config: RunConfig, dataset: DataSet, device: torch.device) -> Callable[[], None]:
    """Return a function that runs one step on random images; warm-up and ramp are done."""
    size = (config.batch_size, *dataset.shape)
    records = torch.randint(0, 256, size, dtype=torch.uint8)
    if dataset.kind != "image":
        records = torch.rand(size).half()
    batch: Batch = records.to(device), (torch.arange(config.batch_size) % len(dataset.class_names)).to(device)
    iteration = KINDS[type(config)].new_iteration(config, dataset, device)
    iteration.state.step = config.settled_step
    return lambda: iteration.run([batch] * config.batches_per_step)


def seconds_of(step: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        step()
        torch.cuda.synchronize(device)
        return time.perf_counter() - began
    began = time.process_time()
    step()
    return time.process_time() - began


def measure(names: list[str], device: torch.device) -> list[dict[str, Any]]:
    """Measure every configuration with a step that is small enough for the device."""
    rows = []
    for name in names:
        preset, configs = configurations(name)
        for config in configs:
            if config.precision == "bfloat16" and device.type == "cpu":
                config = replace(config, precision="float32")
            dataset, _ = planned_data(preset, config)
            planned = cost(config, dataset, device)
            if planned.flops > LARGEST[device.type]:
                continue
            step = stepper(config, dataset, device)
            times = [seconds_of(step, device) for _ in range(WARMUP + TIMED)][WARMUP:]
            low, *_, high = statistics.quantiles(times, n=5)
            median = statistics.median(times)
            rows.append(
                {
                    "benchmark": "presets", "op": command_of(config), "shape": name,
                    "batch_size": config.batch_size, "dtype": config.precision, "provider": "eager",
                    "pass": "full", "median_s": median, "q20_s": low, "q80_s": high,
                    "images_per_s": config.batch_size / median, "flop_per_s": planned.flops / median,
                }
            )  # fmt: skip
            print(f"{name} {command_of(config)}: {config.batch_size / median:,.3g} images/s", flush=True)
    return rows


def read_measured(path: Path) -> dict[tuple[str, str], float]:
    """Read images per second by (preset, command) from a file of ``--measure``."""
    try:
        rows = json.loads(path.read_text())["rows"]
        return {(row["shape"], row["op"]): row["images_per_s"] for row in rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise command.UserError(f"--measured {path}: expected a file of --measure ({error})") from None


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.preset_plans", description=__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="default: all")
    parser.add_argument(
        "--measure", type=Path, metavar="FILE", help="time the presets that are small enough; write JSON"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE", help="read the last column of the table from this file"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    options = parser.parse_args(argv)
    known = [*PRESETS, *REDUCED]
    if unknown := sorted(set(options.presets) - set(known)):
        raise command.UserError(f"PRESET {unknown[0]}: unknown; expected one of {', '.join(known)}")
    names = options.presets or known
    if options.measure is not None:
        device = choose_device(options.device)
        torch.set_num_threads(1)
        content = {"environment": environment(device), "rows": measure(names, device)}
        replace_file(options.measure, json.dumps(content, indent=1) + "\n")
        return 0
    measured = {} if options.measured is None else read_measured(options.measured)
    print(HEAD)
    for name in names:
        preset, configs = configurations(name)
        for config in configs:
            print(row(name, preset, config, measured), flush=True)
    return 0


if __name__ == "__main__":
    command.run(main)
