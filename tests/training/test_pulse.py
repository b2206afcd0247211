"""The other processes report a process that dies, is stopped or hangs, and exit."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from support.helpers import SMALL, command, free_port

from diffratio_fast.training.processes import pulse
from diffratio_fast.training.processes.pulse import STATUS, Pulse

MEMBER = """
import os, sys, time
from torch.distributed import TCPStore
from datetime import timedelta
from diffratio_fast.training.processes.pulse import Pulse

rank, port, what = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
store = TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60), False)
own = TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=60), False)
with Pulse(print, limit=3.0, rank=rank, size=2, store=own, beat=0.1).beating() as pulse:
    for turn in range(100_000):
        pulse.phase("data")
        if what == "hang" and rank == 1 and turn == 5:
            time.sleep(1000)
        pulse.phase("step")
        if what == "error" and rank == 1 and turn == 5:
            raise ValueError("its own trouble")
        store.set(f"turn/{rank}/{turn}", "here")
        store.wait([f"turn/{1 - rank}/{turn}"], timedelta(seconds=200))  # as in an all-reduce
        if turn == 3:
            print(f"ready {os.getpid()}", flush=True)
        time.sleep(0.02)
"""


def members(what: str) -> list[subprocess.Popen[str]]:
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-c", MEMBER, str(rank), str(port), what],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in started:
        assert process.stdout is not None and "ready" in process.stdout.readline()
    return started


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("hang", "furthest behind is process 1 (pid {pid} on"),
        ("error", "process 1 (pid {pid} on"),
    ],
)
def test_the_other_process_is_named(what: str, expected: str) -> None:
    first, second = members(what)
    try:
        _, printed = first.communicate(timeout=120)
        assert first.returncode == STATUS, printed
        line = next(text for text in printed.splitlines() if text.startswith("error: "))
        assert expected.format(pid=second.pid) in line and "error: process 0: " in line
        words = {
            "hang": "in 'data'",
            "error": "has ended: ValueError: its own trouble",
        }
        assert words[what] in line
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


class Shared(dict[str, bytes]):
    """A store within this process."""

    def set(self, key: str, value: str) -> None:
        self[key] = value.encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key]


def wait_for(condition: threading.Event) -> None:
    assert condition.wait(60)


def test_work_free_of_limits_may_take_any_time_and_a_member_that_is_done_is_not_missed() -> None:
    store, ended = Shared(), []
    one, two = (
        Pulse(print, limit=0.2, rank=rank, size=2, store=store, end=ended.append, beat=0.01)
        for rank in range(2)
    )
    with one.beating():
        one.phase("step")
        with two.beating():
            two.phase("evaluate", free=True)
            time.sleep(1.0)  # five times the limit
        time.sleep(1.0)
    assert ended == []


def test_a_store_that_is_gone_ends_the_process() -> None:
    class Gone(Shared):
        def set(self, key: str, value: str) -> None:
            if self:
                raise RuntimeError("Connection reset by peer\nand more")
            super().set(key, value)

    ended = threading.Event()
    watcher = Pulse(print, limit=9.0, rank=1, size=2, store=Gone(), end=lambda status: ended.set(), beat=0.01)
    with watcher.beating():
        wait_for(ended)


def test_a_loader_that_gives_nothing_is_spoken_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "STALL", 0.1)
    printed: list[str] = []
    heard = threading.Event()

    def say(line: str) -> None:
        printed.append(line)
        heard.set()

    with Pulse(say, limit=9.0, beat=0.01).beating() as watcher:
        watcher.phase("data")
        wait_for(heard)
        time.sleep(0.3)
        assert len(printed) == 1 and "the loader has given no batch for" in printed[0]
        heard.clear()
        watcher.phase("step")
        time.sleep(0.3)
        assert len(printed) == 1
        watcher.phase("data")
        wait_for(heard)
    assert len(printed) == 2


def test_who_is_missing_when_a_connection_is_lost() -> None:
    store = Shared()
    one, two = (Pulse(print, limit=99.0, rank=rank, size=2, store=store, beat=0.02) for rank in range(2))
    with one.beating():
        with two.beating():
            time.sleep(0.3)
            assert one.missing() is None
        assert one.missing() is None  # it exited normally
        last = store["pulse/1"].decode().replace("done", "")
        late = threading.Timer(0.04, store.set, ("pulse/1", last.replace('"beat": 0', '"beat": 99')))
        store.set("pulse/1", last)
        late.start()  # a last beat that is noticed only after the connection was lost
        assert f"process 1 (pid {os.getpid()} on" in (one.missing() or "")
        late.join()


def test_no_thread_is_left(tmp_path: Path) -> None:
    before = threading.active_count()
    with Pulse(print, limit=1.0).beating():
        assert threading.active_count() == before + 1
    assert threading.active_count() == before


# ------------------------------------------------------------------------------- processes that train


def ranks(where: Path, *options: str) -> list[subprocess.Popen[str]]:
    """Two processes of one run, as a launcher starts them; both are past their first checkpoint."""
    started = []
    port = free_port()
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        arguments = [*SMALL, "--steps", "100000", "--run-dir", "run", *options]
        started.append(
            subprocess.Popen(
                command("train", *arguments), cwd=where, env=environment, text=True,
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
        )  # fmt: skip
    log, deadline = where / "run" / "metrics.jsonl", time.monotonic() + 240
    while not (log.exists() and '"step": 8,' in log.read_text()):
        assert all(process.poll() is None for process in started) and time.monotonic() < deadline
        time.sleep(0.02)
    return started


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=lambda s: s.name)
def test_a_run_names_the_process_that_is_gone(sent: signal.Signals, tmp_path: Path) -> None:
    first, second = ranks(tmp_path, "--hang-timeout", "5")
    try:
        second.send_signal(sent)
        _, printed = first.communicate(timeout=240)
        lines = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and f"process 1 (pid {second.pid} on" in lines[0], printed
        assert "has died" in lines[0] and first.returncode in (2, STATUS)
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()
