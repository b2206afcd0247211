"""Distributed training in processes forked from one that has imported all modules.

Usage: python -m support.ranks PLAN.json. A plan is a list of entries, each with the number of "processes" and
a file "out":
{"kind": "train" | "pretrain", "options": {...}, "steps": N}, whose state ends up in the file ("taped": true
replays recorded steps instead of a CUDA graph), or
{"command": [NAME, argument, ...]}, whose output ends up in FILE.0, FILE.1, ... Prints the exit statuses.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from diffratio_fast import command
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.processes.world import World, is_sharded, joined
from diffratio_fast.training.state.run_state import RunState
from diffratio_fast.training.step.capture import Captured
from support.tape import NothingIsWrong, Recorder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_ranks(processes: int, function: Callable[[], None]) -> list[int]:
    """Call ``function`` in child processes with torchrun's environment; return their process IDs."""
    port, children = free_port(), []
    for rank in range(processes):
        pid = os.fork()
        if pid:
            children.append(pid)
            continue
        os.environ |= {
            "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        status = 1
        try:
            function()
            status = 0
        except SystemExit as left:
            status = int(left.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def wait_for(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def steps(entry: dict[str, Any]) -> None:
    """Train the steps of a plan's entry; rank 0 writes the weights."""
    with joined(torch.device("cpu")) as world:
        state = (taped_steps if entry.get("taped") else run_steps)(entry, world)
        tensors = {
            name: (tensor.full_tensor() if is_sharded(tensor) else tensor).detach().contiguous().clone()
            for name, tensor in state.tensors()
        }
        if world.main:
            save_file(tensors, Path(entry["out"]))


def run_steps(entry: dict[str, Any], world: World) -> RunState:
    kind, config = {"train": (Trainer, TrainConfig), "pretrain": (Pretrainer, PretrainConfig)}[entry["kind"]]
    settings = config(device="cpu", threads=1, **entry["options"])
    run = kind("digits", settings, RunDirectory(Path(entry["out"]).parent / "none"), world=world)
    batches = run.batches()
    for _ in range(entry["steps"]):
        run.advance(next(batches))
    return run.state


def taped_steps(entry: dict[str, Any], world: World) -> RunState:
    """The steps as with ``--capture``, with a tape instead of a CUDA graph."""
    settings = TrainConfig(device="cpu", threads=1, capture=True, **entry["options"])
    device, dataset = torch.device("cpu"), open_dataset(settings.data)
    iteration = Trainer.new_iteration(settings, dataset, device, world=world)
    step = Captured(iteration, Recorder())
    source = dataset.batches(
        "train", settings.batch_size, seed=settings.seed, rank=world.rank, world_size=world.size
    )
    with NothingIsWrong():
        for _ in range(entry["steps"]):
            step.run([next(source) for _ in range(settings.ratio_steps)])
    return iteration.state


def call(entry: dict[str, Any]) -> None:
    """Run a command of the package in this process."""
    name, *arguments = entry["command"]
    out = os.open(f"{entry['out']}.{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    main = importlib.import_module(f"diffratio_fast.{name}").main
    command.run(lambda _: main(arguments))


def main() -> None:
    torch.set_num_threads(1)
    statuses = []
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        work = call if "command" in entry else steps
        statuses.append(wait_for(fork_ranks(entry["processes"], lambda: work(entry))))  # noqa: B023
    print(json.dumps(statuses))


if __name__ == "__main__":
    main()
