"""history.jsonl: one line per start of a run, with time, step, versions and options."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from diffratio_fast.runs.derived import Derived
from diffratio_fast.storage.reading import parse_json, read_text
from diffratio_fast.storage.writing import replace_file

COMPARED = ("diffratio_fast", "git_commit", "torch", "numpy", "device", "threads", "simd", "processes")
"""Versions whose changes are reported: rounding may differ from then on."""


def read_history(path: Path) -> list[dict[str, Any]]:
    """The starts of a run, in order; damaged lines are skipped."""
    lines = []
    try:
        text = read_text(path)
    except OSError:
        return []
    for line in text.splitlines():
        try:
            found = parse_json(line)
        except ValueError:
            continue
        if isinstance(found, dict) and isinstance(found.get("environment"), dict):
            lines.append(found)
    return lines


def changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Describe the differences between two environments; empty if there are none."""
    return ", ".join(
        f"{name} {before.get(name)} -> {now.get(name)}"
        for name in COMPARED
        if name in before and before.get(name) != now.get(name)
    )


def add_start(path: Path, derived: Derived, **entry: Any) -> None:
    """Append a line to the history; a failure is a warning, as for all derived output."""
    lines = [*read_history(path), {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **entry}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    derived.attempt("history.jsonl", lambda: replace_file(path, text))
