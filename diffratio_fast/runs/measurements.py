"""measurements.json of a run: report data that is not in the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import parse_json
from diffratio_fast.storage.writing import replace_file


def read_measurements(root: Path) -> dict[str, Any]:
    """Read the measurements; an empty dictionary if the file is missing or damaged."""
    path = RunPaths(root).measurements
    try:
        found = parse_json(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def keep_measurements(root: Path, **values: Any) -> None:
    """Add ``values`` to the measurements; existing entries with the same name are replaced."""
    replace_file(RunPaths(root).measurements, json.dumps(read_measurements(root) | values, indent=1) + "\n")


def keep_evaluation(root: Path, result: dict[str, Any]) -> None:
    """Add a result of ``evaluate``; an existing result of the same protocol is replaced."""
    reference = result["reference"]
    row = {
        "features": result["extractor"]["name"],
        "reference": " ".join(filter(None, (reference.get("name") or "", reference.get("split")))),
        "count": result["count"],
        "seeds": result["seeds"],
        "figures": {name: figure["mean"] for name, figure in result["summary"].items()},
    }
    same = ("features", "reference", "count", "seeds")
    kept = read_measurements(root).get("evaluations", [])
    others = [other for other in kept if any(other.get(name) != row[name] for name in same)]
    keep_measurements(root, evaluations=[*others, row])
