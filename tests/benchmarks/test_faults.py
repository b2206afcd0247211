"""A small part of the fault injection of benchmarks/fault_injection.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT


@pytest.mark.slow
def test_runs_under_faults_end_as_if_nothing_had_been(tmp_path: Path) -> None:
    out = tmp_path / "faults.json"
    result = subprocess.run(
        [sys.executable, "-m", "benchmarks.fault_injection", "--cases", "6", "--processes", "1,1,2",
         "--json", out],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    content = json.loads(out.read_text())
    assert content["lost"] == 0 and content["tracebacks"] == 0 and len(content["rows"]) == 6
    first = ["kill", "kill in save", "stop", "damage", "full disk", "full file system"]
    assert [row["kinds"][0] for row in content["rows"]] == first
    assert {row["processes"] for row in content["rows"]} == {1, 2}
