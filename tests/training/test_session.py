"""Processes of one start find each other in a store with keys of earlier starts."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support.helpers import SMALL

from diffratio_fast import train
from diffratio_fast.errors import UserError
from diffratio_fast.training.processes.session import PREFIX, agree

PATIENCE = timedelta(seconds=60)


def start(store: dist.Store, size: int, delays: dict[int, float] | None = None) -> list[str]:
    """The names that ``size`` processes (threads here) agree on; some of them start late."""
    names = [""] * size

    def process(rank: int) -> None:
        time.sleep((delays or {}).get(rank, 0.0))
        names[rank] = agree(store, rank, size, PATIENCE)

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return names


@pytest.mark.parametrize("late", [0, 3])
def test_every_start_has_a_name_of_its_own(late: int) -> None:
    store = dist.HashStore()
    seen = set()
    for _ in range(3):
        names = start(store, 4, {late: 0.2})
        assert len(set(names)) == 1 and names[0] not in seen
        seen.add(names[0])


def test_what_dead_processes_left_is_not_taken_for_this_start() -> None:
    store = dist.HashStore()
    stale = [f"dead{rank}" for rank in range(2)]
    for rank, token in enumerate(stale):
        store.set(f"{PREFIX}/token/{rank}", token)
    store.set(f"{PREFIX}/proposal", json.dumps(stale))
    store.set(f"{PREFIX}/{'-'.join(stale)}/0", "confirmed")
    store.set(f"{PREFIX}/{'-'.join(stale)}/1", "confirmed")
    names = start(store, 2, {1: 0.3})  # rank 0 reads the dead rank 1's token first
    assert len(set(names)) == 1 and "dead" not in names[0]


def test_fewer_processes_after_a_change_of_nodes() -> None:
    store = dist.HashStore()
    start(store, 4)
    assert len(set(start(store, 2))) == 1


def test_a_process_that_does_not_come_is_an_error() -> None:
    with pytest.raises(UserError, match="only a part of the 2 processes started"):
        agree(dist.HashStore(), 0, 2, timedelta(seconds=0.2))


@pytest.mark.slow
def test_torchrun_restarts_after_a_kill(tmp_path: Path) -> None:
    """A rank is killed in a job of a real torchrun: restarted once, it ends like an uninterrupted one."""
    options = [*SMALL, "--steps", "30", "--checkpoint-every", "2", "--log-every", "1", "--eval-every", "40"]
    options += ["--hang-timeout", "20"]

    def launched(name: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command += ["--max-restarts", "2", "-m", "diffratio_fast.train", *options, "--run-dir", name]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(train.__file__).parents[1])},
        )  # fmt: skip

    undisturbed = launched("undisturbed")
    printed, _ = undisturbed.communicate(timeout=400)
    assert undisturbed.returncode == 0, printed
    job = launched("killed")
    deadline = time.monotonic() + 300
    while not list((tmp_path / "killed" / "checkpoint").glob("step-????????")):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    workers = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    printed, _ = job.communicate(timeout=400)
    assert job.returncode == 0, printed
    assert "resuming at step" in printed, printed
    found, wanted = (
        load_file(tmp_path / name / "generator.safetensors") for name in ("killed", "undisturbed")
    )
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
