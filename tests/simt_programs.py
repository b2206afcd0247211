"""Programs that execute CUDA kernels on the CPU: the shim of tests/simt compiled once, and linked to each of them."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SIMT = ROOT / "tests" / "simt"
sys.path.insert(0, str(ROOT / "build_backend"))
import probe  # noqa: E402

SHIM = ["banks", "context", "global_memory", "harness", "machine", "matrix_host", "ptx_host", "shadow",
        "shared_memory", "sync_points"]  # fmt: skip
FLAGS = ["-std=c++20", "-g", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{SIMT}"]
PLAIN = ["-O2"]
SANITIZED = ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


@dataclass
class Programs:
    """Compiles on demand into `folder` and keeps what it has compiled."""

    folder: Path
    _objects: dict[tuple[str, ...], list[Path]] = field(default_factory=dict)

    def sanitized(self) -> list[str]:
        """Flags for the sanitizers, or the plain ones where there are none."""
        source = self.folder / "empty.cpp"
        source.write_text("int main() {}\n")
        command = [probe.find_compiler(), *SANITIZED, source, "-o", self.folder / "empty"]
        found = subprocess.run(list(map(str, command)), capture_output=True).returncode == 0
        return SANITIZED if found else PLAIN

    def build(self, name: str, sources: list[str], flags: list[str], define: tuple[str, ...] = ()) -> Path:
        """The program of these sources (paths in the repository) and the shim."""
        kind = "-".join(flags).replace("=", "-").replace(",", "-")
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        key = tuple(flags)
        missing = [] if key in self._objects else [SIMT / f"{part}.cpp" for part in SHIM]
        own = [ROOT / source for source in sources]
        names = {source: folder / f"{source.parent.name}-{source.stem}.o" for source in missing + own}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda source: _compile([*flags, *define, "-c", source, "-o", names[source]]), names))
        if missing:
            self._objects[key] = [names[source] for source in missing]
        program = folder / name
        _compile([*flags, *self._objects[key], *(names[source] for source in own), "-o", program])
        return program


def _compile(arguments: list) -> None:
    command = [str(probe.find_compiler()), *FLAGS, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
