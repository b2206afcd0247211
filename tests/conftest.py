"""Shared by all tests: reproducible torch, and tests that are not collected if they cannot run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

# Tests are small: a second thread does not help, and on a busy machine threads that wait for one another
# make them ten times slower. Processes that tests start inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from support.helpers import SMALL
from support.simt_programs import Programs

from diffratio_fast import train

# The CUDA checks need a CUDA device; without one they are not collected (no list of skips).
collect_ignore: list[str] = [] if torch.cuda.is_available() else ["gpu"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``-n``, one worker runs all tests of a file: fixtures of a file are created once."""
    from xdist.scheduler import LoadFileScheduling

    return LoadFileScheduling(config, log)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def simt_programs(tmp_path_factory: pytest.TempPathFactory) -> Programs:
    """Compiles the CUDA-on-CPU programs, each once per session."""
    return Programs(tmp_path_factory.mktemp("simt"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a small finished run of the digits; each test file has its own."""
    where = tmp_path_factory.mktemp("trained") / "run"
    threads = torch.get_num_threads()
    assert train.main([*SMALL, "--steps", "3", "--run-dir", str(where)]) == 0
    torch.set_num_threads(threads)
    return where
