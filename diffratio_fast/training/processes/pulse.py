"""A thread that sees to it that a run goes on: it speaks of a stalled loader, and ends a run that hangs.

With several processes each puts a beat into their common store every ``BEAT`` seconds, from this thread, and
reads the others'. A process whose beats stop has died or was stopped; one whose beats go on while its work
does not hangs in something. In either case every process that still lives says which one it is and ends, so
that the launcher can start them again. PyTorch's own time-outs end such a run much later, and name nobody.
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
"""Seconds between beats."""
STALL = 60.0
"""Seconds without a batch after which a word is said."""
DONE = "done"
STATUS = 3
"""Exit status of a process that ends because another died or hangs."""


class Store(Protocol):
    """Of ``torch.distributed.Store`` what is needed here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...


@dataclass
class Other:
    """What is known of another process: its last beat and progress, and when they were seen to change."""

    beat: int = -1
    progress: int = -1
    done: bool = False
    phase: str = "start"
    where: str = "no sign of it yet"
    beat_at: float = 0.0
    progress_at: float = 0.0


class Pulse:
    """Watches over a run's main thread, and over the other processes.

    The main thread says with ``phase`` what it begins; work inside a phase ``free`` of limits (an evaluation,
    a save) may take any time. ``limit`` is in seconds; without a ``store`` there are no others, and only a
    stalled loader is spoken of.
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
        self._said = False
        self._others = {other: Other() for other in range(size) if other != rank}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="diffratio-pulse", daemon=True)

    def phase(self, name: str, *, free: bool = False) -> None:
        """The main thread begins something; ``data`` is waiting for a batch."""
        self._phase, self._free, self._began = name, free, time.monotonic()
        self._progress += 1
        self._said = False

    @contextlib.contextmanager
    def beating(self) -> Iterator[Pulse]:
        """Beats while the block runs; where it ends by an error, the others hear of it."""
        now = time.monotonic()
        for other in self._others.values():
            other.beat_at = other.progress_at = now
        if self.store is not None:
            self._send(0)  # so that it can be named, however soon it dies
        self._thread.start()
        try:
            yield self
        except (UserError, ReportedElsewhere, KeyboardInterrupt):  # whoever needs to know is told otherwise
            self._finish(DONE)
            raise
        except BaseException as error:
            self._finish(f"{type(error).__name__}: {_first_line(error)}")
            raise
        self._finish(DONE)

    def missing(self) -> str | None:
        """Which other process gives no beat for a while; to be asked when a connection is lost."""
        for _ in range(3):  # in the first turn its last beat may yet be seen to come
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
            with contextlib.suppress(Exception):  # the store may have gone with its process
                self._send(0, ended)

    def _run(self) -> None:
        beat = 0
        while not self._stop.wait(self.beat_seconds):
            beat += 1
            self._look_at_the_loader()
            if self.store is None:
                continue
            try:
                self._send(beat)
                lost = self._look_at_others()
            except Exception as error:  # the store raises RuntimeErrors of many kinds when it is gone
                if self._stop.is_set():
                    return
                lost = f"the process that keeps the others' common store is gone ({_first_line(error)})"
            if lost and not self._stop.is_set():
                print(f"error: process {self.rank}: {lost}; ending", file=sys.stderr, flush=True)
                self.end(STATUS)
                return

    def _look_at_the_loader(self) -> None:
        waited = time.monotonic() - self._began
        if self._phase == "data" and waited > STALL and not self._said:
            self._said = True
            self.warn(f"warning: the loader has given no batch for {waited:.0f} s; still waiting")

    def _send(self, beat: int, ended: str = "") -> None:
        assert self.store is not None
        content = {
            "beat": beat, "progress": self._progress, "phase": self._phase, "free": self._free,
            "ended": ended, "where": f"pid {os.getpid()} on {socket.gethostname()}",
        }  # fmt: skip
        self.store.set(f"pulse/{self.rank}", json.dumps(content))

    def _look_at_others(self) -> str | None:
        """What is said of a process that has died or hangs; None where all go on."""
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
                return f"process {rank} ({other.where}) has died or was stopped: no beat for {self.limit:g} s"
            if now - other.progress_at > self.limit:
                stuck.append((other.progress, f"process {rank} ({other.where}), in {other.phase!r}"))
        # while one evaluates or saves, the others wait for it, however long it takes
        at_work = sum(not other.done for other in self._others.values())
        if anybody_free or not stuck or len(stuck) < at_work or now - self._began <= self.limit:
            return None
        stuck.append((self._progress, f"process {self.rank} (this one), in {self._phase!r}"))
        behind = min(stuck)[1]
        return f"nothing has gone on for {self.limit:g} s; furthest behind is {behind}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
