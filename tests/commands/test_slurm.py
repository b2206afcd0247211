"""The SLURM script with stand-ins for SLURM's commands: two processes, a signal, the job is requeued."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support import ROOT
from support.helpers import SMALL, free_port

SCRIPT = ROOT / "examples" / "train.slurm"


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """The environment of a job on one node of two GPUs."""
    tools = tmp_path / "bin"
    tools.mkdir()
    commands = {
        "srun": 'exec "$@"',
        "scontrol": f'if [ "$1" = show ]; then echo localhost; else echo "$@" > {tmp_path}/scontrol; fi',
        "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    }
    for name, text in commands.items():
        (tools / name).write_text(f"#!/bin/bash\n{text}\n")
        (tools / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_GPUS_ON_NODE": "2", "SLURM_CPUS_PER_TASK": "2", "SLURM_JOB_ID": "7",
        "MASTER_PORT": str(free_port()),
    }  # fmt: skip


@pytest.mark.slow
def test_a_signal_saves_and_the_job_is_queued_again(slurm: dict[str, str], tmp_path: Path) -> None:
    job = subprocess.Popen(
        ["bash", str(SCRIPT), *SMALL, "--steps", "100000", "--run-dir", "run"],
        cwd=tmp_path, env=slurm, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (log.exists() and '"step": 8,' in log.read_text()):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    printed, _ = job.communicate(timeout=240)
    assert job.returncode == 0, printed
    assert "SIGUSR1: saved at step" in printed and "the same command resumes" in printed
    assert (tmp_path / "scontrol").read_text() == "requeue 7\n"
    assert (tmp_path / "run" / "checkpoint").exists() and not (tmp_path / "run" / "summary.json").exists()
