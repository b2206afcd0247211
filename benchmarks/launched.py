"""A job of torchrun's own agent with workers that are forked, so that each start takes no imports.

``torchrun`` reads its command line and calls ``elastic_launch``; here it is called with a function in place
of a program. Rendezvous, shared store, restarts and signals are those of every torchrun job.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


class Job:
    """``nodes`` agents, each a process of its own with ``processes`` workers that call ``work``.

    Workers note their process ids as ``where/RESTART-RANK``. With one node the rendezvous is as of
    ``--standalone``; with several it is c10d at ``port``.
    """

    def __init__(
        self, where: Path, work: Callable[[], None], sink: int, *, processes: int, nodes: int, port: int,
        restarts: int,
    ) -> None:  # fmt: skip
        self.where = where
        where.mkdir()

        def worker() -> None:
            name = f"{time.time_ns()}-{os.environ['RANK']}"
            (where / name).write_text(str(os.getpid()))
            work()

        endpoint = f"127.0.0.1:{port if nodes > 1 else 0}"
        config = LaunchConfig(
            nodes, nodes, processes, run_id=f"faults-{port}", rdzv_backend="c10d", rdzv_endpoint=endpoint,
            rdzv_configs={"timeout": 120, "join_timeout": 120}, max_restarts=restarts, monitor_interval=0.05,
            start_method="fork", logs_specs=DefaultLogsSpecs(),
        )  # fmt: skip
        self.agents = [self._fork(config, worker, sink) for _ in range(nodes)]
        self.statuses: dict[int, int] = {}

    def _fork(self, config: LaunchConfig, worker: Callable[[], None], sink: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            os.setpgid(0, 0)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            elastic_launch(config, worker)()
            status = 0
        except BaseException as error:
            # the agent's report of failed workers is long, and a test of tracebacks is not of it
            print(f"agent: {type(error).__name__}", file=sys.stderr, flush=True)
        finally:
            sys.stdout.flush()
            os._exit(status)

    def workers(self) -> dict[int, int]:
        """Rank to process id of the workers of the newest start that still live."""
        found: dict[int, int] = {}
        for path in sorted(self.where.iterdir()):
            with contextlib.suppress(ValueError, OSError):
                pid, rank = int(path.read_text()), int(path.name.partition("-")[2])
                os.kill(pid, 0)
                found[rank] = pid
        return found

    def poll(self) -> bool:
        """Whether all agents have ended."""
        for pid in self.agents:
            if pid not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        return len(self.statuses) == len(self.agents)

    def end(self) -> None:
        """Kill whatever is left."""
        for pid in self.agents:
            with contextlib.suppress(OSError):
                os.killpg(pid, signal.SIGKILL)
        for pid in self.workers().values():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        while not self.poll():
            time.sleep(0.01)


def command_line(options: list[Any], *, processes: int, restarts: int) -> list[str]:
    """The command of a real torchrun for the same job."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes),
        "--max-restarts", str(restarts), "-m", "diffratio_fast.train", *map(str, options),
    ]  # fmt: skip
