"""Watchdog thread: warns about a stalled loader, and ends a run that hangs.

Each of several processes writes a heartbeat into their common store every ``BEAT`` seconds, from this thread,
and reads those of the others. If the heartbeats of a process stop, it has died or was suspended; if they
continue without progress, it hangs. In both cases every other process reports it and exits, so that the
launcher can restart them. PyTorch's own timeouts end such a run much later and do not name the process.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from diffratio_fast.errors import ReportedElsewhere, UserError

BEAT = 1.0
"""Seconds between heartbeats."""
STALL = 60.0
"""Seconds without a batch before a warning."""
DONE = "done"
STATUS = 3
"""Exit status of a process that ends because another one has died or hangs."""


class Store(Protocol):
    """The required methods of ``torch.distributed.Store``."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass
class Other:
    """State of another process: its last heartbeat and progress, and when they last changed."""

    beat: int = -1
    progress: int = -1
    done: bool = False
    phase: str = "start"
    where: str = "no heartbeat yet"
    beat_at: float = 0.0
    progress_at: float = 0.0


class Pulse:
    """Watches the main thread of a run, and the other processes.

    The main thread calls ``phase`` at the start of each phase; a ``free`` phase (an evaluation, a save) has
    no time limit. ``limit`` is in seconds. Without a ``store`` there are no other processes, and only a
    stalled loader is reported.
    """

    def __init__(
        self,
        warn: Callable[[str], None],
        *,
        limit: float,
        rank: int = 0,
        size: int = 1,
        store: Store | None = None,
        end: Callable[[int], None] = os._exit,
        beat: float = BEAT,
    ) -> None:
        self.warn, self.limit, self.rank, self.size, self.store, self.end = (
            warn,
            limit,
            rank,
            size,
            store,
            end,
        )
        self.beat_seconds = beat
        self._phase, self._free, self._began, self._progress = "start", True, time.monotonic(), 0
        self._warned = False
        self._others = {other: Other() for other in range(size) if other != rank}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diffratio-pulse", daemon=True)

    def phase(self, name: str, *, free: bool = False) -> None:
        """Enter a phase of the main thread; ``data`` waits for a batch."""
        self._phase, self._free, self._began = name, free, time.monotonic()
        self._progress += 1
        self._warned = False

    @contextlib.contextmanager
    def beating(self) -> Iterator[Pulse]:
        """Context with heartbeats; an error that ends it is sent to the other processes."""
        now = time.monotonic()
        for other in self._others.values():
            other.beat_at = other.progress_at = now
        if self.store is not None:
            self._send(0)  # so that an early failure can be reported
        self._thread.start()
        try:
            yield self
        except (UserError, ReportedElsewhere, KeyboardInterrupt):  # reported elsewhere
            self._finish(DONE)
            raise
        except BaseException as error:
            self._finish(f"{type(error).__name__}: {_first_line(error)}")
            raise
        self._finish(DONE)

    def missing(self) -> str | None:
        """Find another process without recent heartbeats, after a lost connection."""
        for _ in range(3):  # in the first iteration its last heartbeat may still arrive
            before = {rank: other.beat for rank, other in self._others.items()}
            time.sleep(4 * self.beat_seconds)
            for rank, other in self._others.items():
                if other.beat == before[rank] and not other.done:
                    return f"process {rank} ({other.where}) has died"
        return None

    def _finish(self, ended: str) -> None:
        self._stop.set()
        self._thread.join()
        if self.store is not None:
            with contextlib.suppress(Exception):  # the store may have ended with its process
                self._send(0, ended)

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(self.beat_seconds):
            beat += 1
            self._check_loader()
            if self.store is None:
                continue
            try:
                self._send(beat)
                lost = self._check_others()
            except Exception as error:  # a lost store raises many kinds of RuntimeError
                if self._stop.is_set():
                    return
                lost = f"the process with the common store has ended ({_first_line(error)})"
            if lost and not self._stop.is_set():
                print(f"error: process {self.rank}: {lost}; ending", file=sys.stderr, flush=True)
                self.end(STATUS)
                return

    def _check_loader(self) -> None:
        waited = time.monotonic() - self._began
        if self._phase == "data" and waited > STALL and not self._warned:
            self._warned = True
            self.warn(f"warning: the loader has given no batch for {waited:.0f} s; still waiting")

    def _send(self, beat: int, ended: str = "") -> None:
        assert self.store is not None
        content = {
            "beat": beat, "progress": self._progress, "phase": self._phase, "free": self._free,
            "ended": ended, "where": f"pid {os.getpid()} on {socket.gethostname()}",
        }  # fmt: skip
        self.store.set(f"pulse/{self.rank}", json.dumps(content))

    def _check_others(self) -> str | None:
        """The message about a process that has died or hangs; None if all make progress."""
        assert self.store is not None
        now = time.monotonic()
        stuck: list[tuple[int, str]] = []
        anybody_free = self._free
        for rank, other in self._others.items():
            key = f"pulse/{rank}"
            if self.store.check([key]):
                found = json.loads(self.store.get(key))
                other.where, other.done = found["where"], found["ended"] == DONE
                if found["ended"] and not other.done:
                    return f"process {rank} ({other.where}) has ended: {found['ended']}"
                if found["beat"] != other.beat:
                    other.beat, other.beat_at = found["beat"], now
                if found["progress"] != other.progress:
                    other.progress, other.progress_at = found["progress"], now
                other.phase = found["phase"]
                anybody_free = anybody_free or found["free"]
            if other.done:
                continue
            if now - other.beat_at > self.limit:
                silent = f"no heartbeat for {self.limit:g} s"
                return f"process {rank} ({other.where}) has died or was suspended: {silent}"
            if now - other.progress_at > self.limit:
                stuck.append((other.progress, f"process {rank} ({other.where}), in {other.phase!r}"))
        # while one process evaluates or saves, the others wait without a limit
        at_work = sum(not other.done for other in self._others.values())
        if anybody_free or not stuck or len(stuck) < at_work or now - self._began <= self.limit:
            return None
        stuck.append((self._progress, f"process {self.rank} (this one), in {self._phase!r}"))
        behind = min(stuck)[1]
        return f"no progress for {self.limit:g} s; furthest behind is {behind}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
