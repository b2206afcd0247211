"""measurements.json of a run: what its report shows beside the log."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import parse_json
from diffratio_fast.storage.writing import replace_file


def read_measurements(root: Path) -> dict[str, Any]:
    """What is kept there; nothing where there is none, or it is damaged."""
    path = RunPaths(root).measurements
    try:
        found = parse_json(path.read_text()) if path.exists() else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def keep_measurements(root: Path, **values: Any) -> None:
    """Put ``values`` beside what is kept there, in place of those of the same name."""
    replace_file(RunPaths(root).measurements, json.dumps(read_measurements(root) | values, indent=1) + "\n")


def keep_evaluation(root: Path, result: dict[str, Any]) -> None:
    """Put the result of ``evaluate`` there, in place of one of the same protocol."""
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
