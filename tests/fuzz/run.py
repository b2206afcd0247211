"""Fuzz the readers of foreign files: ``python tests/fuzz/run.py [TARGET ...] [--seconds N]``.

Each target runs in a child of bounded memory for its share of the time. Inputs are mutations of a kept
corpus; one with a new outcome (such as another error message) is added to it for the rest
of the run, and with ``--keep`` permanently. An error that the target does not allow, a crash, a hang or a
lack of memory is a finding: it is printed with the file that holds the input, and the exit status is 1. With
a fixed seed the inputs are the same each time, as many as the time allows. ``--engine atheris`` mutates by
coverage instead, where that is installed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import re
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

CORPUS = HERE / "corpus"
FOUND = HERE / "found"
MEMORY = 1 << 30
"""Limit of the address space that an input may add to that of the process, in bytes."""
PATIENCE = 60.0
"""CPU time in seconds after which an input counts as a hang."""
LONGEST = 1 << 16
"""Maximum size of an input in bytes."""
KEPT = 24
KEPT_BYTES = 4096
"""Maximum number of inputs per target, and bytes per input, that ``--keep`` stores."""
NUMBERS = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 1 << 40, (1 << 64) - 1)


def mutated(data: bytes, other: bytes, words: tuple[bytes, ...], chance: random.Random) -> bytes:
    """``data`` after one to six random changes; ``other`` is an input to copy pieces from."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(len(content) + 1)
        kind = chance.randrange(8)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << chance.randrange(8)
        elif kind == 1 and content:
            content[at % len(content)] = chance.randrange(256)
        elif kind == 2:
            del content[at : at + chance.randint(1, 16)]
        elif kind == 3:
            content[at:at] = content[at : at + chance.randint(1, 64)] * chance.choice((1, 1, 2, 50))
        elif kind == 4:
            start = chance.randrange(len(other) + 1)
            content[at : at + chance.choice((0, 8))] = other[start : start + chance.randint(1, 64)]
        elif kind == 5 and words:
            content[at:at] = chance.choice(words)
        elif kind == 6:
            form = chance.choice("BHIQ")
            size = struct.calcsize(form)
            number = chance.choice(NUMBERS) & ((1 << 8 * size) - 1)
            content[at : at + size] = struct.pack(chance.choice("<>") + form, number)
        elif kind == 7 and chance.random() < 0.3:
            del content[at:]
    return bytes(content[:LONGEST])


def corpus_of(name: str) -> list[bytes]:
    """The kept inputs of a target, after its own seeds."""
    from targets import TARGETS

    kept = sorted((CORPUS / name).glob("*")) if (CORPUS / name).is_dir() else []
    return [*TARGETS[name].seeds(), *(path.read_bytes() for path in kept)]


def outcome(name: str, data: bytes, folder: Path) -> str:
    """Short name of the outcome of an input; raises the errors that the target does not allow."""
    from targets import TARGETS

    target = TARGETS[name]
    try:
        target.run(data, folder)
    except target.allowed as error:
        return f"{type(error).__name__} {re.sub(r'[^A-Za-z ]+', '.', str(error))[-80:]}"
    return "read"


def search(name: str, seconds: float, seed: int, folder: Path, keep: bool) -> int:
    """Try mutations for the given time and return their number. The current one is in ``folder``/input."""
    from targets import TARGETS

    chance = random.Random(f"{seed} {name}")
    corpus, seen = corpus_of(name), set()
    current, work = folder / "input", folder / "work"
    end, number = time.monotonic() + seconds, 0
    queue = list(corpus)
    while time.monotonic() < end or queue:
        fresh = not queue
        data = queue.pop() if queue else mutated(
            chance.choice(corpus), chance.choice(corpus), TARGETS[name].words, chance
        )  # fmt: skip
        current.write_bytes(data)
        work.mkdir()
        found = outcome(name, data, work)
        shutil.rmtree(work)
        number += 1
        if fresh and found not in seen and len(corpus) < 2000:
            corpus.append(data)
            if keep and len(data) <= KEPT_BYTES:
                where = CORPUS / name
                where.mkdir(parents=True, exist_ok=True)
                if len(list(where.iterdir())) < KEPT:
                    (where / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)
        seen.add(found)
    return number


def child(name: str, options: argparse.Namespace, seconds: float, folder: Path) -> None:
    """Main function of a target's process; it never returns."""
    status = 1
    try:
        warnings.simplefilter("ignore")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        number = search(name, seconds, options.seed, folder, options.keep)
        print(f"{name:>12}: {number:,} inputs, nothing found", flush=True)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def watched(pid: int, current: Path) -> int:
    """Wait for a child; it is killed if one input takes more than ``PATIENCE``."""
    tick = os.sysconf("SC_CLK_TCK")
    before, began = 0.0, 0.0
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        used = sum(map(int, Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13])) / tick
        changed = current.stat().st_mtime if current.exists() else 0.0
        if changed != before:
            before, began = changed, used
        elif used - began > PATIENCE:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)


def with_atheris(name: str, seconds: float, seed: int) -> None:
    """Mutate one target's corpus by coverage, with atheris; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["diffratio_fast.storage", "diffratio_fast.data"]):
        import targets

    folder = Path(tempfile.mkdtemp())
    seeds = folder / "corpus"
    seeds.mkdir()
    for number, data in enumerate(corpus_of(name)):
        (seeds / str(number)).write_bytes(data)
    work = folder / "work"

    def once(data: bytes) -> None:
        work.mkdir(exist_ok=True)
        try:
            targets.TARGETS[name].run(data, work)
        except targets.TARGETS[name].allowed:
            pass
        finally:
            shutil.rmtree(work)

    FOUND.mkdir(exist_ok=True)
    atheris.Setup(
        [
            sys.argv[0], str(seeds), f"-max_total_time={int(seconds)}", f"-seed={seed + 1}",
            "-rss_limit_mb=4096",
            f"-max_len={LONGEST}", f"-artifact_prefix={FOUND}/{name}-", "-timeout=60", "-verbosity=0",
            "-print_final_stats=1",
        ],
        once,
    )  # fmt: skip
    atheris.Fuzz()


def main() -> int:
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"{', '.join(TARGETS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=60.0, help="for all targets together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="add inputs with new outcomes to the corpus")
    parser.add_argument("--engine", choices=("own", "atheris"), default="own")
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    if unknown := [name for name in names if name not in TARGETS]:
        parser.error(f"no such target: {unknown[0]}")
    share, failed = options.seconds / len(names), []
    for name in names:
        with tempfile.TemporaryDirectory() as where:
            folder = Path(where)
            sys.stdout.flush()
            pid = os.fork()
            if pid == 0:
                if options.engine == "atheris":
                    one = [__file__, "--one", name, str(share), str(options.seed)]
                    os.execv(sys.executable, [sys.executable, *one])
                child(name, options, share, folder)
            status = watched(pid, folder / "input")
            if status == 0:
                continue
            failed.append(name)
            if (folder / "input").exists():
                FOUND.mkdir(exist_ok=True)
                data = (folder / "input").read_bytes()
                path = FOUND / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
                path.write_bytes(data)
                print(f"{name:>12}: status {status}; the input is {path}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        with_atheris(sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
    sys.exit(main())
