"""Starts of a run under faults: processes, and what befalls them. See ``fault_injection``."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.launched import Job, command_line
from diffratio_fast import command, train
from diffratio_fast.storage import checkpoints

STEPS = 14
OPTIONS = [
    "--device", "cpu", "--threads", "1", "--steps", str(STEPS), "--batch-size", "8", "--generator-width", "8",
    "--ratio-width", "8", "--latent-size", "4", "--log-every", "3", "--eval-every", "50",
    "--checkpoint-every", "2", "--snapshot-every", "50", "--refit-steps", "0",
    "--eval-features", "none",
]  # fmt: skip
PATIENCE = 30.0
"""Seconds that processes have to end by themselves once one of them is gone."""
JOB_PATIENCE = 240.0
"""Seconds that a whole job of torchrun may take."""


class Output:
    """A pipe that processes write to: a limit on the size of files would hold for a file too."""

    def __init__(self) -> None:
        self._source, self._sink = os.pipe()
        os.set_blocking(self._source, False)
        self._output = b""

    def output(self) -> str:
        """What the processes have written so far."""
        with contextlib.suppress(BlockingIOError):
            while self._source >= 0:
                piece = os.read(self._source, 65536)
                self._output += piece
                if not piece:
                    os.close(self._source)
                    self._source = -1
        return self._output.decode(errors="replace")


class Attempt(Output):
    """The processes of one start of the run, forked from this one, as torchrun would start them."""

    def __init__(
        self,
        where: Path,
        processes: int,
        parallel: str,
        prepare: Callable[[int], None] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        super().__init__()
        self.arguments = [*OPTIONS, "--parallel", parallel, "--run-dir", str(where / "run"), *options]
        port = free_port()
        self.children = [self._fork(rank, processes, port, prepare) for rank in range(processes)]
        os.close(self._sink)
        self.statuses: dict[int, int] = {}
        self.launcher_ended = False

    def _fork(self, rank: int, processes: int, port: int, prepare: Callable[[int], None] | None) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 70
        try:
            os.dup2(self._sink, 1)
            os.dup2(self._sink, 2)
            if processes > 1:
                os.environ |= {
                    "RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_RANK": str(rank),
                    "LOCAL_WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                }  # fmt: skip
            if prepare is not None:
                prepare(rank)
            status = _status_of(self.arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def poll(self) -> bool:
        """Whether all processes have ended."""
        for pid in self.children:
            if pid not in self.statuses:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.statuses[pid] = os.waitstatus_to_exitcode(status)
        self.output()
        return len(self.statuses) == len(self.children)

    def send(self, number: int, *ranks: int) -> None:
        for rank in ranks or range(len(self.children)):
            if self.children[rank] not in self.statuses:
                os.kill(self.children[rank], number)

    def wait(self) -> list[int]:
        """Exit statuses of all. Where one fails and others stay, they are ended, as torchrun would do."""
        ended = None
        while not self.poll():
            if self.statuses and ended is None:
                ended = time.monotonic()
            if ended is not None and time.monotonic() - ended > PATIENCE:
                if not any(self.statuses.values()):
                    raise RuntimeError(f"processes hang after the others' end: {self.output()[-2000:]}")
                self.send(signal.SIGKILL)
                self.launcher_ended = True
            time.sleep(0.002)
        return [self.statuses[pid] for pid in self.children]


def _status_of(arguments: list[str]) -> int:
    """Train as a process of the command would; its exit status."""
    try:
        command.run(lambda _: train.main(arguments))
    except SystemExit as ended:
        return int(ended.code or 0)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Launched(Output):
    """A whole job of torchrun, which starts its workers again as often as one of them dies."""

    def __init__(
        self, where: Path, processes: int, parallel: str, options: Sequence[str] = (), *, nodes: int,
        real: bool, restarts: int = 4,
    ) -> None:  # fmt: skip
        super().__init__()
        arguments = [*OPTIONS, "--parallel", parallel, "--run-dir", str(where / "run"), *options]
        arguments += ["--hang-timeout", "15"]
        self.job: Job | None = None
        self.process: subprocess.Popen[bytes] | None = None
        if real:
            self.process = subprocess.Popen(
                command_line(arguments, processes=processes, restarts=restarts),
                stdout=self._sink, stderr=self._sink, start_new_session=True,
            )  # fmt: skip
        else:
            shutil.rmtree(where / "workers", ignore_errors=True)

            def work() -> None:
                if status := _status_of(arguments):
                    os._exit(status)
                # else the agent waits for what the function returns

            self.job = Job(
                where / "workers", work, self._sink, processes=processes // nodes, nodes=nodes,
                port=free_port(), restarts=restarts,
            )  # fmt: skip
        os.close(self._sink)

    def workers(self) -> dict[int, int]:
        """Rank (of a real torchrun: a number) to process id of the workers that live."""
        if self.job is not None:
            return self.job.workers()
        assert self.process is not None
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
            return dict(enumerate(map(int, children.split())))
        return {}

    def poll(self) -> bool:
        self.output()
        if self.job is not None:
            return self.job.poll()
        assert self.process is not None
        return self.process.poll() is not None

    def wait(self) -> list[int]:
        """Exit statuses of the agents; a job that does not end is killed and is an error."""
        deadline = time.monotonic() + JOB_PATIENCE
        while not self.poll():
            if time.monotonic() > deadline:
                self.end()
                raise RuntimeError(f"a job of torchrun hangs: {self.output()[-3000:]}")
            time.sleep(0.01)
        self.output()
        return list(self.job.statuses.values()) if self.job else [self.process.returncode]  # type: ignore[union-attr]

    def end(self) -> None:
        if self.job is not None:
            self.job.end()
        elif self.process is not None:
            with contextlib.suppress(OSError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class _Count:
    """Lets ``act`` come before the n-th call of what it wraps, and the ``more`` after it."""

    def __init__(self, first: int, more: int, act: Callable[[], None]) -> None:
        self.first, self.last, self.act, self.calls = first, first + more, act, 0

    def wrap(self, function: Any) -> Any:
        def wrapped(*arguments: Any, **keywords: Any) -> Any:
            self.calls += 1
            if self.first <= self.calls <= self.last:
                self.act()
            return function(*arguments, **keywords)

        return wrapped


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def kill_in_save(first: int, victim: int | None) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        if victim in (None, rank):
            count = _Count(first, 0, _die)
            os.fsync, os.rename, os.replace = map(count.wrap, (os.fsync, os.rename, os.replace))
            shutil.rmtree = count.wrap(shutil.rmtree)

    return prepare


def full_disk(first: int, more: int, limit: int | None) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif rank == 0:
            os.fsync = _Count(first, more, _no_space).wrap(os.fsync)

    return prepare


def broken_disk(first: int, more: int, number: int) -> Callable[[int], None]:
    """From the first to the last of these calls, what rank 0 does to files of the run fails."""

    def fail() -> None:
        raise OSError(number, os.strerror(number))

    def prepare(rank: int) -> None:
        if rank:
            return
        count = _Count(first, more, fail)

        def of_the_run(name: str, function: Any) -> Any:
            counted = count.wrap(function)

            def wrapped(target: Any, *arguments: Any, **named: Any) -> Any:
                flags = arguments[0] if name == "open" and arguments else os.O_WRONLY
                writes = bool(flags & (os.O_WRONLY | os.O_RDWR))
                path = str(target)
                if isinstance(target, int):
                    with contextlib.suppress(OSError):
                        path = os.readlink(f"/proc/self/fd/{target}")
                relative = isinstance(named.get("dir_fd", named.get("src_dir_fd")), int)
                ours = "/run" in path or (relative and not path.startswith("/"))
                chosen = counted if writes and ours and ".lock" not in path else function
                return chosen(target, *arguments, **named)

            return wrapped

        for name in ("open", "write", "fsync", "replace", "rename", "unlink", "mkdir"):
            setattr(os, name, of_the_run(name, getattr(os, name)))

    return prepare


@contextlib.contextmanager
def small_disk(where: Path, size: str) -> Any:
    """A real file system at ``where``; False where it cannot be mounted."""
    where.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(where)], check=False)


def fill(disk: Path) -> None:
    with contextlib.suppress(OSError), (disk / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))


LINKS = (
    "report.html", "config.yaml.tmp", "metrics.jsonl.tmp", "report.html.tmp", "history.jsonl.tmp",
    "summary.json.tmp",
)  # fmt: skip
REFUSED_LINKS = (".lock", "checkpoint", "samples", "snapshots")


def damage(where: Path, chance: random.Random) -> str | None:
    """Damage the newest checkpoint, where another one is whole; what was done."""
    found = checkpoints.candidates(where / "run" / "checkpoint")
    whole = 0
    for path in found[1:]:
        with contextlib.suppress(checkpoints.Damaged):
            checkpoints.read_index(path)
            whole += 1
    if not whole:
        return None
    file = chance.choice(sorted(found[0].iterdir()))
    how = chance.choice(["flipped", "cut", "emptied", "removed"])
    content = bytearray(file.read_bytes())
    if how == "removed" or not content:
        file.unlink()
        return f"{file.name} removed"
    if how == "flipped":
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    else:
        del content[chance.randrange(len(content)) if how == "cut" else 0 :]
    file.write_bytes(content)
    return f"{file.name} {how}"
