"""Every objective of the table trains, resumes exactly and writes its metrics."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.helpers import SMALL, checkpoint_tensors

from diffratio_fast import sample, train
from diffratio_fast.training import monitor

DENSE = ["--backbone", "mlp", "--backbone-options", '{"width": 16, "depth": 2}']
OPTIONS: dict[str, list[str]] = {
    "gan": [],
    "conditional": [*DENSE, "--stable-targets"],
    "diffratio": ["--ratio-head", "energy", "--ratio-matched-pairs", "--ratio-loss-weight", "total_std"],
}


@pytest.mark.parametrize("objective", OPTIONS)
def test_a_run_resumes_exactly(objective: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "SAMPLES", 64)
    options = [
        "digits", *SMALL, *OPTIONS[objective], "--objective", objective, "--lr-schedule", "constant",
        "--eval-every", "100",
    ]  # fmt: skip
    straight, parts = tmp_path / "straight", tmp_path / "parts"
    assert train.main([*options, "--steps", "5", "--run-dir", str(straight)]) == 0
    for steps in ("3", "5"):
        assert train.main([*options, "--steps", steps, "--run-dir", str(parts)]) == 0
    wanted, found = checkpoint_tensors(straight), checkpoint_tensors(parts)
    assert wanted.keys() == found.keys()
    # an interrupted run has the same state; `sums` are not compared
    assert all(torch.equal(wanted[name], found[name]) for name in wanted if not name.startswith("sums"))
    has_ratio = objective != "conditional"
    assert (parts / "ratio.safetensors").exists() == has_ratio
    assert ("divergence" in json.loads((parts / "summary.json").read_text())) == has_ratio
    out = tmp_path / "images.npz"
    assert sample.main([str(parts), "--count", "4", "--out", str(out), "--device", "cpu"]) == 0
