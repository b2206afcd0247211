"""Runs that are killed, run out of disk or have checkpoints damaged, and must end as if nothing had been.

Usage: python -m benchmarks.fault_injection [--cases N] [--seed N] [--processes 1,2,4] [--json FILE]

A case trains a tiny model under faults that its own seed decides, starts it again after each as torchrun
would, and at last lets it finish. The run is lost unless its networks, its whole state and its log are then,
bit for bit, those of a run that nothing disturbed. Faults:

- kill: SIGKILL of all processes, or of one of several, at a random moment
- kill in save: the same right before the n-th flush to disk, rename or removal of a directory
- stop: SIGTERM or SIGUSR1 to one process: all save and end
- damage: a bit of the newest checkpoint flips, or a file of it is cut, emptied or removed; an older is whole
- full disk: the n-th flush to disk and some after it fail with ENOSPC; or the kernel limits the size of files
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from benchmarks.harness import environment
from diffratio_fast import command, train
from diffratio_fast.training import monitor
from diffratio_fast.training.processes import pulse
from diffratio_fast.training.state import checkpoint

STEPS = 14
OPTIONS = [
    "--device", "cpu", "--threads", "1", "--steps", str(STEPS), "--batch-size", "8", "--generator-width", "8",
    "--ratio-width", "8", "--latent-size", "4", "--log-every", "3", "--eval-every", "50",
    "--checkpoint-every", "2", "--snapshot-every", "50", "--refit-steps", "0",
]  # fmt: skip
TIMED = {"seconds", "images_per_second", "loader_share", "memory_bytes", "evaluation_seconds"}
PATIENCE = 30.0
"""Seconds that processes have to end by themselves once one of them is gone."""


class Attempt:
    """The processes of one start of the run, forked from this one, as torchrun would start them."""

    def __init__(
        self,
        where: Path,
        processes: int,
        parallel: str,
        prepare: Callable[[int], None] | None = None,
        options: Sequence[str] = (),
    ) -> None:
        # a pipe, as a limit on the size of files would hold for a file too
        self._source, self._sink = os.pipe()
        os.set_blocking(self._source, False)
        self._output = b""
        self.arguments = [*OPTIONS, "--parallel", parallel, "--run-dir", str(where / "run"), *options]
        port = _free_port()
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
            with contextlib.suppress(SystemExit):
                command.run(lambda _: _note(train.main(self.arguments)))
            status = _STATUS[0]
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

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


_STATUS = [2]


def _note(status: int | None) -> int:
    _STATUS[0] = status or 0
    return _STATUS[0]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


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


def _kill_in_save(first: int, victim: int | None) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        if victim in (None, rank):
            count = _Count(first, 0, _die)
            os.fsync, os.rename, os.replace = map(count.wrap, (os.fsync, os.rename, os.replace))
            shutil.rmtree = count.wrap(shutil.rmtree)

    return prepare


def _full_disk(first: int, more: int, limit: int | None) -> Callable[[int], None]:
    def prepare(rank: int) -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        elif rank == 0:
            os.fsync = _Count(first, more, _no_space).wrap(os.fsync)

    return prepare


def _damage(where: Path, chance: random.Random) -> str | None:
    """Damage the newest checkpoint, where another one is whole; what was done."""
    found = checkpoint.candidates(where / "run" / "checkpoint")
    whole = 0
    for path in found[1:]:
        with contextlib.suppress(checkpoint.Damaged):
            checkpoint.read_index(path)
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


def end_state(where: Path) -> dict[str, Any]:
    """What a finished run has come to, without what depends on the clock."""
    run = where / "run"
    state: dict[str, Any] = {"log": [], "steps": json.loads((run / "summary.json").read_text())["steps"]}
    files = [(name, run / f"{name}.safetensors") for name in ("generator", "ratio")]
    # which process wrote a tensor does not matter; parts of one are in the order of the processes
    newest = checkpoint.candidates(run / "checkpoint")[0]
    files += [(newest.name, file) for file in sorted(newest.glob("*.safetensors"))]
    for of, file in files:
        for name, tensor in load_file(file).items():
            key = f"{of} {name}"
            state[key] = state.get(key, b"") + tensor.numpy().tobytes()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        state["log"].append({key: value for key, value in json.loads(line).items() if key not in TIMED})
    return state


class References:
    """End states and durations of runs that nothing disturbed, by the number of processes."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, str], tuple[dict[str, Any], float]] = {}

    def __call__(self, processes: int, parallel: str) -> tuple[dict[str, Any], float]:
        if (processes, parallel) not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                began = time.monotonic()
                attempt = Attempt(Path(folder), processes, parallel)
                if any(attempt.wait()):
                    raise RuntimeError(attempt.output())
                self._known[processes, parallel] = end_state(Path(folder)), time.monotonic() - began
        return self._known[processes, parallel]


FAULTS = ("kill", "kill in save", "stop", "damage", "full disk")


def one_fault(
    kind: str, where: Path, processes: int, parallel: str, seconds: float, chance: random.Random
) -> str:
    """Start the run and let the fault befall it; what happened, in words."""
    victim = chance.choice([None, *range(processes)]) if processes > 1 else None
    name = "all" if victim is None else f"process {victim}"
    prepare = None
    options: list[str] = []
    words = kind
    if kind == "kill in save":
        first = chance.randint(1, 45)
        prepare, words = _kill_in_save(first, victim), f"kill in save: {name} at call {first}"
    elif kind == "full disk":
        first, more = chance.randint(1, 45), chance.randint(0, 6)
        limit = chance.choice([None, None, 3000, 20_000])
        options = ["--on-save-failure", chance.choice(["continue", "stop"])]
        prepare = _full_disk(first, more, limit)
        what = f"flushes {first} to {first + more}" if limit is None else f"files above {limit} bytes"
        words = f"full disk: {what}, {options[-1]}"
    attempt = Attempt(where, processes, parallel, prepare, options)
    if kind in ("kill", "stop", "damage"):
        moment = time.monotonic() + chance.uniform(0, seconds)
        while time.monotonic() < moment and not attempt.poll():
            time.sleep(0.001)
        number = signal.SIGKILL if kind != "stop" else chance.choice([signal.SIGTERM, signal.SIGUSR1])
        ranks = [] if victim is None else [victim]
        attempt.send(number, *(ranks or ([0] if kind == "stop" else [])))
        words = f"{signal.Signals(number).name} of {name}"
    statuses = attempt.wait()
    words += " (the launcher ended the others)" if attempt.launcher_ended else ""
    allowed = {0, 2, pulse.STATUS, -signal.SIGKILL} | (
        {-signal.SIGTERM, -signal.SIGUSR1} if kind == "stop" else set()
    )
    if not set(statuses) <= allowed:
        raise RuntimeError(f"exit statuses {statuses} after {words}: {attempt.output()[-3000:]}")
    if kind == "damage":
        words += f", then {_damage(where, chance) or 'nothing to damage'}"
    return words


def run_case(seed: int, processes: list[int], references: References) -> dict[str, Any]:
    """One run under faults, brought to its end; a row of the result."""
    chance = random.Random(seed)
    count = chance.choice(processes)
    parallel = chance.choice(["ddp", "fsdp"])
    wanted, seconds = references(count, parallel)
    began = time.monotonic()
    row: dict[str, Any] = {"seed": seed, "processes": count, "parallel": parallel, "faults": [], "lost": True}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        try:
            kinds = [FAULTS[seed % len(FAULTS)], *chance.choices(FAULTS, k=chance.randint(0, 2))]
            for kind in kinds:
                row["faults"].append(one_fault(kind, where, count, parallel, seconds, chance))
            attempt = Attempt(where, count, parallel)
            if any(attempt.wait()):
                raise RuntimeError(attempt.output()[-3000:])
            found = end_state(where)
            differing = sorted(key for key in wanted if found.get(key) != wanted[key])
            row["lost"] = bool(differing) or found.keys() != wanted.keys()
            if row["lost"]:
                row["differing"] = differing[:5]
        except (RuntimeError, OSError) as error:
            row["error"] = str(error)
    row["kinds"], row["seconds"] = kinds, round(time.monotonic() - began, 2)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first case; the next have the next numbers"
    )
    parser.add_argument("--processes", default="1,1,1,2,2,4", help="numbers of processes to draw from")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    monitor.PixelMetrics.suits = staticmethod(lambda dataset: False)  # type: ignore[method-assign]
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        train.main(
            [*OPTIONS, "--run-dir", str(Path(folder) / "run")]
        )  # what is done once is not done in each fork
    references, rows = References(), []
    processes = [int(word) for word in options.processes.split(",")]
    for seed in range(options.seed, options.seed + options.cases):
        row = run_case(seed, processes, references)
        rows.append(row)
        verdict, told = "LOST" if row["lost"] else "same", "; ".join(row["faults"])
        print(
            f"{seed:>5}  {row['processes']} {row['parallel']}  {verdict}  {told}  {row.get('error', '')}",
            flush=True,
        )
    lost = sum(row["lost"] for row in rows)
    faults = Counter(kind for row in rows for kind in row["kinds"])
    print(
        f"{len(rows)} cases, {lost} lost; {', '.join(f'{n} x {kind}' for kind, n in sorted(faults.items()))}"
    )
    if options.json is not None:
        content = {
            "environment": environment(torch.device("cpu")), "steps": STEPS, "cases": len(rows), "lost": lost,
            "faults": dict(faults), "rows": rows,
        }  # fmt: skip
        options.json.write_text(json.dumps(content, indent=1) + "\n")
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
