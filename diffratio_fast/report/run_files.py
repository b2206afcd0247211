"""The content of a report, read from a run directory; missing files give empty values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio_fast.runs.measurements import read_measurements
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import parse_json, read_bytes, read_text, read_yaml

MAX_GRIDS = 12
MAX_BYTES = 8 * 2**20
"""Limits of the sample grids on the page: the newest, and evenly spaced earlier ones."""


@dataclass(frozen=True)
class RunFiles:
    """``logged`` and ``evaluated`` are the two kinds of lines of metrics.jsonl; ``grids`` are (step, PNG).

    ``measured`` are the evaluations with a divergence: those of a generator, not of a denoiser.
    """

    root: Path
    config: dict[str, Any]
    logged: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    measured: list[dict[str, Any]]
    summary: dict[str, Any]
    measurements: dict[str, Any]
    grids: list[tuple[int, bytes]]
    neighbors: bytes | None

    @property
    def step(self) -> int:
        return max((line["step"] for line in (*self.logged, *self.evaluated)), default=0)


def read(root: Path) -> RunFiles:
    """Read the files of a run directory; damaged files count as missing."""
    paths, lines = RunPaths(root), []
    for text in _text(paths.metrics).splitlines():
        try:
            line = parse_json(text)
        except ValueError:  # truncated by a kill
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    try:
        config = read_yaml(paths.config)
    except (OSError, ValueError):
        config = {}
    return RunFiles(
        root=root,
        config=config if isinstance(config, dict) else {},
        logged=[line for line in lines if "images_per_second" in line],
        evaluated=[line for line in lines if "images_per_second" not in line],
        measured=[line for line in lines if "sigma" in line],
        summary=_json(paths.summary),
        measurements=read_measurements(root),
        grids=_grids(paths.sample_grids()),
        neighbors=read_bytes(paths.neighbors) if paths.neighbors.exists() else None,
    )


def _text(path: Path) -> str:
    return read_text(path) if path.exists() else ""


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(_text(path) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _grids(found: list[tuple[int, Path]]) -> list[tuple[int, bytes]]:
    if not found:
        return []
    largest = max(path.stat().st_size for _, path in found)
    count = max(1, min(MAX_GRIDS, len(found), MAX_BYTES // max(largest, 1)))
    chosen = {len(found) - 1 - i * len(found) // count for i in range(count)}
    return [(found[i][0], read_bytes(found[i][1])) for i in sorted(chosen)]
