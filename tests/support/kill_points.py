"""Prepare a data set in child processes that kill themselves, each one step later than the last.

Usage: kill_points.py SOURCE DESTINATION SHARD_BYTES. Prints how many children were killed. A step is a
rename, a flush to disk or a chunk of records; the process is killed right before it.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from diffratio_fast import prepare
from diffratio_fast.data import writer


def child(arguments: list[str], last: int) -> None:
    """Prepare, but kill the process at step number ``last``."""
    step = 0

    def deadly(function: Any) -> Any:
        def wrapped(*positional: Any, **named: Any) -> Any:
            nonlocal step
            step += 1
            if step == last:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*positional, **named)

        return wrapped

    os.replace, os.fsync = deadly(os.replace), deadly(os.fsync)
    writer.Moments.add = deadly(writer.Moments.add)  # type: ignore[method-assign]
    writer.CHUNK_BYTES = 192 * 3
    writer.shutil.rmtree = deadly(writer.shutil.rmtree)  # type: ignore[attr-defined]
    prepare.main(arguments)
    os._exit(0)


def main() -> None:
    source, destination, shard_bytes = sys.argv[1:]
    arguments = [source, destination, "--shard-bytes", shard_bytes, "--workers", "2"]
    killed = 0
    while True:
        pid = os.fork()
        if pid == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            # Steps 1, 2, ... of the remaining work: every step is the last one of some child.
            child(arguments, last=1 + killed % 12)
        _, status = os.waitpid(pid, 0)
        if os.WIFEXITED(status):
            break
        killed += 1
        assert killed < 1000, "no progress"
    leftovers = [p.name for p in Path(destination).iterdir() if p.suffix == ".tmp" or p.is_dir()]
    print(killed, os.waitstatus_to_exitcode(status), *leftovers)


if __name__ == "__main__":
    main()
