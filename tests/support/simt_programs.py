"""Programs that execute CUDA kernels on the CPU: the shim of tests/simt, compiled once, and the kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from support import ROOT

SIMT = ROOT / "tests" / "simt"
sys.path.insert(0, str(ROOT / "build_backend"))
import probe  # noqa: E402

FLAGS = ["-std=c++20", "-O1", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{SIMT}"]
PLAIN: list[str] = []
SANITIZED = ["-g1", "-fsanitize=address"]
# Only for the kernels: in the shim this would triple the compile time.
STRICT = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]


@dataclass
class Programs:
    """Compiles on demand into `folder` and keeps the programs."""

    folder: Path
    _shims: dict[str, Path] = field(default_factory=dict)
    _programs: dict[tuple[str, str], Path] = field(default_factory=dict)

    def sanitized(self) -> list[str]:
        """Flags for the sanitizers, or the plain ones if they are not available."""
        source = self.folder / "empty.cpp"
        source.write_text("int main() {}\n")
        command = [probe.find_compiler(), *SANITIZED, *STRICT, source, "-o", self.folder / "empty"]
        found = subprocess.run(list(map(str, command)), capture_output=True).returncode == 0
        return SANITIZED if found else PLAIN

    def build(self, name: str, sources: list[str], flags: list[str], define: tuple[str, ...] = ()) -> Path:
        """The program of these sources (paths in the repository) and the shim."""
        kind = "sanitized" if flags else "plain"
        if (name, kind) in self._programs:
            return self._programs[name, kind]
        folder = self.folder / kind
        folder.mkdir(exist_ok=True)
        own = [ROOT / source for source in sources]
        objects = {source: folder / f"{source.parent.name}-{source.stem}.o" for source in own}
        strict = [*flags, *(STRICT if flags else []), *define]
        jobs = [[*strict, "-c", source, "-o", objects[source]] for source in own]
        if kind not in self._shims:
            self._shims[kind] = folder / "shim.o"
            jobs.insert(0, [*flags, "-c", SIMT / "shim.cpp", "-o", self._shims[kind]])
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_compile, jobs))
        program = self._programs[name, kind] = folder / name
        _compile([*strict, *objects.values(), self._shims[kind], "-o", program])
        return program


def _compile(arguments: list) -> None:
    command = [str(probe.find_compiler()), *FLAGS, *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *arguments], capture_output=True, text=True, timeout=600)
