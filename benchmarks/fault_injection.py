"""Runs under every fault that a cluster has for them, which must end as if nothing had been.

Usage: python -m benchmarks.fault_injection [--cases N] [--seed N] [--processes 1,2,4] [--json FILE]

A case trains a tiny model under faults that its own seed decides, starts it again after each as torchrun
would, and at last lets it finish. The run is lost unless its networks, its whole state and its log are then,
bit for bit, those of a run that nothing disturbed (lines of the log may be missing where the disk refused
them). No process may print a traceback, or end with a status that the documentation does not name. Faults:

- kill: SIGKILL of all processes, or of one of several, at a random moment
- kill in save: the same right before the n-th flush to disk, rename or removal of a directory
- stop: SIGINT, SIGTERM or SIGUSR1 to one process: all save and end
- damage: a bit of the newest checkpoint flips, or a file of it is cut, emptied or removed; an older is whole
- full disk: the n-th flush to disk and some after it fail with ENOSPC; or the kernel limits the size of files
- full file system: a real one of a few MiB is filled at a random moment, and perhaps emptied again
- broken disk: from the n-th call on a file of the run on, some fail with EIO, EROFS, ESTALE or EACCES
- links: files and directories of the run are symbolic links to a file elsewhere, which must not change
- other data: the data set is replaced by another of the same shape: refused until it is back
- torchrun: 2 or 4 processes, on one node or two, of which one or several are killed once or twice, while
  torchrun starts them again: the job must finish by itself
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import random
import re
import shutil
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from benchmarks.faults import (
    LINKS,
    OPTIONS,
    REFUSED_LINKS,
    STEPS,
    Attempt,
    Launched,
    broken_disk,
    damage,
    fill,
    full_disk,
    kill_in_save,
    small_disk,
)
from benchmarks.harness import environment
from diffratio_fast import prepare, train
from diffratio_fast.storage import checkpoints
from diffratio_fast.training.processes import pulse

TIMED = {"seconds", "images_per_second", "loader_share", "memory_bytes", "evaluation_seconds"}
TRACEBACK = re.compile(r"^Traceback \(most recent call last\)", re.MULTILINE)
"""A process's own; torchrun's agent logs a killed worker in another form."""
REFUSALS = (errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES)


def end_state(where: Path) -> dict[str, Any]:
    """The results of a finished run, without values that depend on the clock."""
    run = where / "run"
    state: dict[str, Any] = {"log": [], "steps": json.loads((run / "summary.json").read_text())["steps"]}
    files = [(name, run / f"{name}.safetensors") for name in ("generator", "ratio")]
    # independent of the process that wrote a tensor; parts of a tensor are in rank order
    newest = checkpoints.candidates(run / "checkpoint")[0]
    files += [(newest.name, file) for file in sorted(newest.glob("*.safetensors"))]
    for of, file in files:
        for name, tensor in load_file(file).items():
            key = f"{of} {name}"
            state[key] = state.get(key, b"") + tensor.numpy().tobytes()
    for line in (run / "metrics.jsonl").read_text().splitlines():
        state["log"].append({key: value for key, value in json.loads(line).items() if key not in TIMED})
    return state


class Data:
    """Two data sets of the same shape, as ``prepare`` writes them."""

    def __init__(self, root: Path) -> None:
        self.sets = [self._prepared(root / name, seed) for seed, name in enumerate("ab")]

    def _prepared(self, where: Path, seed: int) -> Path:
        source = where / "idx"
        source.mkdir(parents=True)
        chance = np.random.default_rng(seed)
        for split, count in (("train", 80), ("t10k", 20)):
            pixels = chance.integers(0, 256, (count, 8, 8), np.uint8)
            labels = (np.arange(count) % 10).astype(np.uint8)
            for what, head, content in (
                ("images-idx3", (0x803, count, 8, 8), pixels), ("labels-idx1", (0x801, count), labels),
            ):  # fmt: skip
                head_bytes = struct.pack(f">{len(head)}I", *head)
                (source / f"{split}-{what}-ubyte").write_bytes(head_bytes + content.tobytes())
        prepare.main([str(source), str(where / "data"), "--validation", "16", "--name", "data"])
        return where / "data"

    def put(self, where: Path, which: int) -> list[str]:
        """Let ``where``/data be that data set; the options of a run on it."""
        shutil.rmtree(where / "data", ignore_errors=True)
        shutil.copytree(self.sets[which], where / "data")
        return ["--data", str(where / "data")]


class References:
    """End states and durations of runs that nothing disturbed, by processes, ``--parallel`` and data."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self._known: dict[tuple[int, str, bool], tuple[dict[str, Any], float]] = {}

    def __call__(self, processes: int, parallel: str, own_data: bool) -> tuple[dict[str, Any], float]:
        key = processes, parallel, own_data
        if key not in self._known:
            with tempfile.TemporaryDirectory() as folder:
                where, began = Path(folder), time.monotonic()
                attempt = Attempt(
                    where, processes, parallel, options=self._data.put(where, 0) if own_data else ()
                )
                if any(attempt.wait()):
                    raise RuntimeError(attempt.output())
                self._known[key] = end_state(where), time.monotonic() - began
        return self._known[key]


class Case:
    """A run of ``processes`` in the directory ``where``; ``seconds`` is what an undisturbed one takes."""

    def __init__(
        self, where: Path, processes: int, parallel: str, seconds: float, chance: random.Random,
        options: Sequence[str], data: Data,
    ) -> None:  # fmt: skip
        self.where, self.processes, self.parallel, self.seconds = where, processes, parallel, seconds
        self.chance, self.options, self.data = chance, list(options), data
        self.outside = where / "outside"
        self.outside.write_text("not to be touched")
        self.tracebacks = 0
        self.disk_refused = False  # lines of the log may be missing

    def fault(self, kind: str) -> str:
        """Start the run and let a fault of this kind befall it; what happened, in words."""
        words: str = getattr(self, "_" + kind.replace(" ", "_"))()
        return f"{kind}: {words}"

    def attempt(self, prepare: Any = None, options: Sequence[str] = ()) -> Attempt:
        return Attempt(self.where, self.processes, self.parallel, prepare, [*self.options, *options])

    def ended(self, attempt: Attempt | Launched, words: str, allowed: set[int]) -> str:
        """Wait for the processes' end; an error unless every status is allowed."""
        statuses = attempt.wait()
        output = attempt.output()
        traced = TRACEBACK.search(output) is not None
        self.tracebacks += traced
        if not set(statuses) <= allowed or traced:
            raise RuntimeError(f"exit statuses {statuses} after {words}: {output[-3000:]}")
        late = " (the launcher ended the others)" if getattr(attempt, "launcher_ended", False) else ""
        return words + late

    def _victim(self) -> tuple[int | None, str]:
        victim = self.chance.choice([None, *range(self.processes)]) if self.processes > 1 else None
        return victim, "all" if victim is None else f"process {victim}"

    def _later(self, attempt: Attempt | Launched, most: float) -> None:
        """Wait for a random moment, or for the processes' end."""
        moment = time.monotonic() + self.chance.uniform(0, most)
        while time.monotonic() < moment and not attempt.poll():
            time.sleep(0.001)

    def _signal(self, numbers: Sequence[signal.Signals], allowed: set[int]) -> str:
        victim, name = self._victim()
        attempt = self.attempt()
        self._later(attempt, self.seconds)
        number = self.chance.choice(numbers)
        # a signal to save goes to one process, SIGKILL perhaps to all
        ranks = [victim] if victim is not None else [] if number == signal.SIGKILL else [0]
        attempt.send(number, *ranks)
        return self.ended(attempt, f"{number.name} of {name}", allowed)

    ORDINARY = frozenset({0, 2, pulse.STATUS, -signal.SIGKILL})

    def _kill(self) -> str:
        return self._signal([signal.SIGKILL], set(self.ORDINARY))

    def _stop(self) -> str:
        numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
        # before Python has its handlers, or after it has put back its own, a signal acts as usual
        early = {-number for number in numbers} | {130, 143}
        return self._signal(numbers, set(self.ORDINARY) | early)

    def _kill_in_save(self) -> str:
        victim, name = self._victim()
        first = self.chance.randint(1, 45)
        attempt = self.attempt(kill_in_save(first, victim))
        return self.ended(attempt, f"{name} at call {first}", set(self.ORDINARY))

    def _damage(self) -> str:
        words = self._kill()
        return f"{words}, then {damage(self.where, self.chance) or 'nothing to damage'}"

    def _policy(self) -> list[str]:
        self.disk_refused = True
        return ["--on-save-failure", self.chance.choice(["continue", "stop"])]

    def _full_disk(self) -> str:
        first, more = self.chance.randint(1, 45), self.chance.randint(0, 6)
        limit = self.chance.choice([None, None, 3000, 20_000])
        policy = self._policy()
        attempt = self.attempt(full_disk(first, more, limit), policy)
        what = f"flushes {first} to {first + more}" if limit is None else f"files above {limit} bytes"
        return self.ended(attempt, f"{what}, {policy[-1]}", set(self.ORDINARY))

    def _broken_disk(self) -> str:
        first, more = self.chance.randint(1, 60), self.chance.choice([0, 3, 20, 1000])
        number, policy = self.chance.choice(REFUSALS), self._policy()
        attempt = self.attempt(broken_disk(first, more, number), policy)
        words = f"{errno.errorcode[number]} at calls {first} to {first + more}, {policy[-1]}"
        return self.ended(attempt, words, set(self.ORDINARY))

    def _full_file_system(self) -> str:
        disk, run = self.where / "disk", self.where / "run"
        with small_disk(disk, "6m") as mounted:
            if not mounted:
                return "no right to mount one"
            if run.exists():
                shutil.move(run, disk / "run")
            os.symlink(disk / "run", run)
            (disk / "run").mkdir(exist_ok=True)
            try:
                policy = self._policy()
                attempt = self.attempt(options=policy)
                self._later(attempt, self.seconds)
                fill(disk)
                emptied = self.chance.random() < 0.5
                self._later(attempt, self.seconds / 2)
                if emptied:
                    (disk / "filler").unlink(missing_ok=True)
                words = f"filled{', then emptied' if emptied else ''}, {policy[-1]}"
                return self.ended(attempt, words, set(self.ORDINARY))
            finally:
                run.unlink()
                (disk / "filler").unlink(missing_ok=True)
                shutil.move(disk / "run", run)

    def _links(self) -> str:
        run = self.where / "run"
        run.mkdir(exist_ok=True)
        for name in self.chance.sample(LINKS, 3):
            (run / name).unlink(missing_ok=True)
            os.symlink(self.outside, run / name)
        words = self._kill()
        refused = self.chance.choice(REFUSED_LINKS)
        kept, path = self.where / "kept", run / refused
        run.mkdir(exist_ok=True)
        if path.exists():
            os.rename(path, kept)
        elsewhere = self.where / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        os.symlink(self.outside if refused == ".lock" else elsewhere, path)
        words = self.ended(self.attempt(), f"{words}; then {refused} is a link", {2, pulse.STATUS})
        path.unlink()
        if kept.exists():
            os.rename(kept, path)
        if self.outside.read_text() != "not to be touched" or any(elsewhere.iterdir()):
            raise RuntimeError(f"what a link leads to was written, after {words}")
        return words

    def _other_data(self) -> str:
        words = self._kill()
        if not checkpoints.candidates(self.where / "run" / "checkpoint"):
            return f"{words}; no checkpoint yet"
        self.data.put(self.where, 1)
        attempt = self.attempt()
        words = self.ended(attempt, f"{words}; then other data", {2, pulse.STATUS})
        if "trained on data with the digest" not in attempt.output():
            raise RuntimeError(f"other data are not noticed: {attempt.output()[-2000:]}")
        self.data.put(self.where, 0)
        return words

    def _torchrun(self) -> str:
        nodes = self.chance.choice([1, 2])
        real = nodes == 1 and self.chance.random() < 0.15
        job = Launched(self.where, self.processes, self.parallel, self.options, nodes=nodes, real=real)
        killed = []
        try:
            for _ in range(self.chance.choice([1, 1, 2])):
                began = time.monotonic()
                while not job.workers() and not job.poll() and time.monotonic() - began < 60:
                    time.sleep(0.01)
                self._later(job, 1.5 * self.seconds + (8 if real else 0))
                alive = job.workers()
                ranks = self.chance.sample(sorted(alive), self.chance.randint(1, len(alive))) if alive else []
                for rank in ranks:
                    with contextlib.suppress(OSError):
                        os.kill(alive[rank], signal.SIGKILL)
                killed.append(f"{ranks}")
                time.sleep(0.5)
            how = "torchrun" if real else "its agent"
            return self.ended(
                job, f"{how}, {nodes} nodes, {self.processes} processes, killed {' and '.join(killed)}", {0}
            )
        finally:
            job.end()


FAULTS = (
    "kill", "kill in save", "stop", "damage", "full disk", "full file system", "broken disk", "links",
    "other data", "torchrun",
)  # fmt: skip
MORE = FAULTS[:8]
"""What may come after the first fault: ``other data`` and ``torchrun`` decide a whole case."""


def run_case(seed: int, processes: list[int], references: References, data: Data) -> dict[str, Any]:
    """Run one case with faults until it finishes; return a row of the results."""
    chance = random.Random(seed)
    kinds = [FAULTS[seed % len(FAULTS)], *chance.choices(MORE, k=chance.randint(0, 2))]
    count = chance.choice([2, 4] if kinds[0] == "torchrun" else processes)
    parallel = chance.choice(["ddp", "fsdp"])
    own_data = kinds[0] == "other data"
    wanted, seconds = references(count, parallel, own_data)
    began = time.monotonic()
    row: dict[str, Any] = {"seed": seed, "processes": count, "parallel": parallel, "faults": [], "lost": True}
    with tempfile.TemporaryDirectory() as folder:
        where = Path(folder)
        options = data.put(where, 0) if own_data else []
        case = Case(where, count, parallel, seconds, chance, options, data)
        try:
            for kind in kinds:
                row["faults"].append(case.fault(kind))
            attempt = case.attempt()
            if any(attempt.wait()):
                raise RuntimeError(attempt.output()[-3000:])
            found = end_state(where)
            if case.disk_refused and all(line in wanted["log"] for line in found["log"]):
                found["log"] = wanted["log"]
            differing = sorted(key for key in wanted if found.get(key) != wanted[key])
            row["lost"] = bool(differing) or found.keys() != wanted.keys()
            if row["lost"]:
                row["differing"] = differing[:5]
        except (RuntimeError, OSError) as error:
            row["error"] = str(error)
        row["tracebacks"] = case.tracebacks
    row["kinds"], row["seconds"] = kinds, round(time.monotonic() - began, 2)
    return row


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=20)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="seed of the first case; the following cases use the following seeds",
    )
    parser.add_argument("--processes", default="1,1,1,2,2,4", help="numbers of processes to draw from")
    parser.add_argument("--only", help="cases whose first fault is this kind: their seeds are a tenth of all")
    parser.add_argument("--json", type=Path, help="written after each case")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    processes = [int(word) for word in options.processes.split(",")]
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            # warm up once, not in each fork
            train.main([*OPTIONS, "--run-dir", str(Path(folder) / "run")])
            data = Data(Path(folder))
        references = References(data)
        step, first = 1, options.seed
        if options.only is not None:
            step, first = len(FAULTS), options.seed * len(FAULTS) + FAULTS.index(options.only)
        for seed in range(first, first + step * options.cases, step):
            row = run_case(seed, processes, references, data)
            rows.append(row)
            verdict, faults_text = "LOST" if row["lost"] else "same", "; ".join(row["faults"])
            print(
                f"{seed:>5}  {row['processes']} {row['parallel']}  {verdict}  {row['seconds']} s  "
                f"{faults_text}  "
                f"{row.get('error', '')}",
                flush=True,
            )
            if options.json is not None:
                options.json.write_text(json.dumps(_result(rows), indent=1) + "\n")
    found = _result(rows)
    faults = ", ".join(f"{number} x {kind}" for kind, number in sorted(found["faults"].items()))
    print(f"{len(rows)} cases, {found['lost']} lost, {found['tracebacks']} tracebacks; {faults}")
    return 1 if found["lost"] or found["tracebacks"] else 0


def _result(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "environment": environment(torch.device("cpu")),
        "steps": STEPS,
        "cases": len(rows),
        "lost": sum(row["lost"] for row in rows),
        "tracebacks": sum(row["tracebacks"] for row in rows),
        "faults": dict(Counter(kind for row in rows for kind in row["kinds"])),
        "rows": rows,
    }


if __name__ == "__main__":
    sys.exit(main())
