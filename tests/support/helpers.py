"""Helpers shared by several test files: commands as processes, small runs."""

from __future__ import annotations

import hashlib
import os
import resource
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from diffratio_fast.errors import UserError

SMALL = [
    "--threads", "1", "--device", "cpu", "--batch-size", "16", "--generator-width", "16",
    "--ratio-width", "16", "--latent-size", "8", "--log-every", "4", "--eval-every", "8",
    "--checkpoint-every", "5", "--snapshot-every", "8", "--refit-steps", "4",
]  # fmt: skip


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-m", f"diffratio_fast.{name}", *map(str, arguments)]


def run(name: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(name, *arguments), cwd=cwd, capture_output=True, text=True, timeout=300, check=False
    )


def in_child(act: Callable[[], object], *, memory: int = 2 << 30, seconds: int = 120) -> str:
    """Text that ``act`` returns in a forked process, or the message if it raises ``UserError``.

    The child may allocate ``memory`` bytes of address space beyond its initial size, and use the given
    seconds of CPU time.
    """
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + memory
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
            try:
                printed = str(act())
            except UserError as error:
                printed = str(error)
            os.write(sink, printed.encode()[:10_000])
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(sink)
    with os.fdopen(source, "rb") as stream:
        printed = stream.read().decode()
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, printed
    return printed


def one_error_line(result: subprocess.CompletedProcess[str]) -> str:
    """Assert that the process ended with status 2 and one line on stderr, and return the line."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("diffratio_fast: ")]
    assert result.returncode == 2, result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]


def newest_checkpoint(run_dir: Path) -> Path:
    return sorted((run_dir / "checkpoint").glob("step-*"))[-1]


def checkpoint_tensors(run_dir: Path) -> dict[str, Tensor]:
    """The tensors of the newest checkpoint of a run with one process."""
    (file,) = newest_checkpoint(run_dir).glob("*.safetensors")
    return load_file(file)


def contents(directory: Path) -> dict[str, tuple[str, int]]:
    """Digest and modification time of every file below a directory."""
    return {
        str(path.relative_to(directory)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def free_port() -> int:
    """A free TCP port of this machine."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
