"""Training steps in processes that work together, forked from one that has imported everything.

Usage: ranks.py PLAN.json. The plan is a list of {"processes": N, "kind": KIND, "options": {...},
"steps": N, "out": FILE}, KIND being "train" or "pretrain"; each entry's averaged and trained weights end up in its file.
"""

from __future__ import annotations

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

from diffratio_fast.config import PretrainConfig, TrainConfig
from diffratio_fast.training.distributed import joined
from diffratio_fast.training.loop import Trainer
from diffratio_fast.training.pretraining import Pretrainer
from diffratio_fast.training.run_directory import RunDirectory


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def fork_ranks(processes: int, function: Callable[[], None]) -> list[int]:
    """Call ``function`` in so many children with torchrun's environment; their process ids."""
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
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return children


def wait_for(children: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]


def steps(entry: dict[str, Any]) -> None:
    """Make the steps of a plan's entry; rank 0 writes the weights."""
    kind, config = {"train": (Trainer, TrainConfig), "pretrain": (Pretrainer, PretrainConfig)}[entry["kind"]]
    settings = config(device="cpu", threads=1, **entry["options"])
    out = Path(entry["out"])
    with joined(torch.device("cpu")) as world:
        run = kind("digits", settings, RunDirectory(out.parent / "none"), world=world)
        batches = run.batches()
        for _ in range(entry["steps"]):
            run.advance(next(batches))
        tensors = dict(run.state.tensors())
        if world.main:
            save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, out)


def main() -> int:
    torch.set_num_threads(1)
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        if any(wait_for(fork_ranks(entry["processes"], lambda entry=entry: steps(entry)))):
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
