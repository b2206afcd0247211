"""The plan of a run, printed by --dry-run: what it would train, on what, at what cost. Nothing is written."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from diffratio_fast.config import TrainConfig
from diffratio_fast.data import SPLITS
from diffratio_fast.training.loop import Trainer
from diffratio_fast.training.run_directory import RunDirectory, environment

WARMUP, TIMED = 5, 20


class _FlopCounter(TorchDispatchMode):
    """Sums torch's own FLOP formulas; its ``FlopCounterMode`` cannot see through ``autograd.grad``."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


def _activation_bytes(trainer: Trainer) -> int:
    """Bytes that one iteration keeps for its backward passes, each storage counted once."""
    seen: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        trainer.iteration.run(next(trainer.batches()))
    return sum(seen.values())


def print_plan(preset: str, config: TrainConfig) -> None:
    """Build the run in memory, measure a few steps of it, and print what the whole would take."""
    directory = RunDirectory(Path(config.run_dir or f"runs/{preset}"))
    trainer = Trainer(preset, config, directory)
    state = trainer.state
    parameters = {
        role: sum(p.numel() for p in getattr(state, role).parameters()) for role in ("generator", "ratio")
    }
    with _FlopCounter() as counter:
        trainer.iteration.run(next(trainer.batches()))
    state_bytes = sum(t.nbytes for _, t in state.tensors())
    gradient_bytes = sum(p.nbytes for n in (state.generator, state.ratio) for p in n.parameters())
    activations = _activation_bytes(trainer)
    batches = trainer.batches()
    times = []
    for _ in range(WARMUP + TIMED):
        start = time.perf_counter()
        trainer.iteration.run(next(batches))
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[WARMUP:])
    about = environment(trainer.device)
    counts = ", ".join(f"{split} {trainer.dataset.count(split):,}" for split in SPLITS)
    shape = " x ".join(str(size) for size in trainer.dataset.shape)
    memory = state_bytes + gradient_bytes + activations
    law = trainer.iteration.ratio_law.name
    rows = {
        "preset": preset,
        "run directory": f"{directory.root}{' (holds a run)' if directory.checkpoint.exists() else ''}",
        "device": f"{trainer.device} ({about['device']}, {about['threads']} threads), {config.precision}",
        "data": f"{config.data}: {shape}, {len(trainer.dataset.class_names)} classes; {counts}",
        "generator": f"{config.generator}, {parameters['generator']:,} parameters",
        "ratio network": f"{config.ratio_network}, {parameters['ratio']:,} parameters",
        "objective": f"{config.divergence}, weight {config.weight}, sigma {law}",
        "steps": f"{config.steps:,} of {config.batch_size} images",
        "FLOPs a step": f"{counter.total / 1e9:.2f} G in matrix products and convolutions",
        "memory": f"{_mebibytes(memory)} beside PyTorch's own (state {_mebibytes(state_bytes)}, "
        f"gradients {_mebibytes(gradient_bytes)}, activations {_mebibytes(activations)})",
        "expected time": f"{_duration(seconds * config.steps)} at {seconds * 1e3:.1f} ms a step",
    }
    for name, value in rows.items():
        print(f"{name:>14}  {value}")


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
