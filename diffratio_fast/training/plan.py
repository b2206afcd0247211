"""The plan of a run, printed by --dry-run: networks, data, cost. Nothing is written."""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from diffratio_fast.config.presets import DATA_SHAPES, PRESETS
from diffratio_fast.config.run import RunConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import SPLITS, DataSet, InMemoryDataSet
from diffratio_fast.data.scaling import EDM_PIXELS, LATENT_SCALINGS, SD_VAE
from diffratio_fast.devices import choose_device
from diffratio_fast.errors import UserError
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.runs.environment import environment
from diffratio_fast.storage import checkpoints
from diffratio_fast.training.kinds import KINDS
from diffratio_fast.training.memory import Cost, cost

GIB = 2**30
WARMUP, TIMED = 5, 20
TIMED_FLOPS = 2e11
"""Maximum FLOPs of a step to time on a CPU; a plan must take seconds only."""


def planned_data(preset: str, config: RunConfig) -> tuple[DataSet, bool]:
    """The run's data set and True, or an empty one of the preset's shape and False."""
    if config.data != PRESETS[preset]["data"] or config.data == "digits" or Path(config.data).exists():
        return open_dataset(config.data, class_conditional=config.class_conditional), True
    kind, shape, classes = DATA_SHAPES[preset]
    latents = kind == "latent_moments"
    empty = torch.empty(0, *shape), torch.empty(0, dtype=torch.int64)
    data = InMemoryDataSet(
        name=f"{config.data} (not there yet)",
        class_names=tuple(str(number) for number in range(classes if config.class_conditional else 1)),
        scaling=LATENT_SCALINGS[SD_VAE] if latents else EDM_PIXELS,
        splits=dict.fromkeys(SPLITS, empty),
        kind=kind,
    )
    return data, False


def device_memory(device: torch.device) -> int:
    """Total memory of a device in bytes: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def advice(config: RunConfig, dataset: DataSet, device: torch.device, needed: Cost, available: float) -> str:
    """The smallest change of options that fits a run into ``available`` bytes."""
    if needed.state + needed.gradients < available:
        size = config.micro_batch or config.batch_size
        for checkpointing in sorted({config.activation_checkpointing, True}):
            part = size
            while part >= 1:
                other = replace(config, micro_batch=part, activation_checkpointing=checkpointing)
                if (found := cost(other, dataset, device).peak) < available:
                    options = [] if part == size else [f"--micro-batch {part}"]
                    options += ["--activation-checkpointing"] * (
                        checkpointing > config.activation_checkpointing
                    )
                    return f"{' '.join(options)} would fit, with about {found / GIB:.2f} GiB"
                part = part // 4 if part > 3 else part - 1
    if config.precision == "float64":
        return "use --precision float32, which needs half of it"
    return (
        f"networks, averages and optimizers alone need {(needed.state + needed.gradients) / GIB:.2f} GiB; "
        "use a smaller preset, or a larger device"
    )


def print_plan(preset: str, config: RunConfig, *, memory: float | None = None) -> None:
    """Print the plan of the run; the step time is measured if a few steps take seconds.

    Raises ``UserError`` with a change of options if the run does not fit into the device's memory (or
    ``memory`` GiB, if given).
    """
    root = KINDS[type(config)].root(preset, config)
    directory = RunDirectory(root)
    device = choose_device(config.device)
    if config.threads is not None:  # before anything is timed or printed, as the run does
        torch.set_num_threads(config.threads)
    dataset, there = planned_data(preset, config)
    planned = cost(config, dataset, device)
    available = device_memory(device) if memory is None else memory * GIB
    about, architectures = environment(device), config.networks_text()
    shape = " x ".join(str(size) for size in dataset.shape)
    counts = "; " + ", ".join(f"{split} {dataset.count(split):,}" for split in SPLITS) if there else ""
    rows = {
        "preset": preset,
        "run directory": f"{root}{' (contains a run)' if checkpoints.exists(directory.checkpoint) else ''}",
        "device": f"{device} ({about['device']}, {about['threads']} threads), {config.precision}",
        "data": f"{dataset.name}: {dataset.kind} {shape}, {len(dataset.class_names)} classes{counts}",
        **{name: f"{architectures[name]}, {n:,} parameters" for name, n in planned.parameters.items()},
        "objective": config.objective_text(),
        "steps": f"{config.steps:,} of {config.batch_size} images"
        + (f", {config.micro_batch} per part" if config.micro_batch else ""),
        "FLOPs per step": f"{planned.flops / 1e9:,.2f} G in matrix products and convolutions",
        "memory": f"about {_size(planned.peak)} of {_size(available)}, without PyTorch's own memory (state "
        f"{_size(planned.state)}, gradients {_size(planned.gradients)}, activations "
        f"{_size(planned.activations)})",
    }
    fits = planned.peak < available
    if fits:
        rows["expected time"] = (
            _expected_time(preset, config, directory, planned) if there else "not measured"
        )
    for name, value in rows.items():
        print(f"{name:>14}  {value}")
    if not fits:
        raise UserError(
            f"the run needs about {planned.peak / GIB:.2f} GiB; the device has {available / GIB:.2f} GiB; "
            f"{advice(config, dataset, device, planned, available)}"
        )


def _expected_time(preset: str, config: RunConfig, directory: RunDirectory, planned: Cost) -> str:
    device = choose_device(config.device)
    if device.type == "cpu" and planned.flops > TIMED_FLOPS:
        return "not measured: a step takes seconds on a CPU"
    run = KINDS[type(config)](preset, config, directory)
    batches = run.batches()
    times = []
    for _ in range(WARMUP + TIMED):
        start = time.perf_counter()
        run.advance(next(batches))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARMUP:])
    training = seconds * config.steps
    evaluations = -(-config.steps // config.eval_every)
    measuring = run.evaluation_seconds() * evaluations
    return (
        f"{_duration(training + measuring)}: {_duration(training)} of steps at {seconds * 1e3:.1f} ms, "
        f"{_duration(measuring)} of evaluations ({evaluations:,})"
    )


def _size(count: float) -> str:
    return f"{count / GIB:.1f} GiB" if count >= 10 * GIB else f"{count / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
