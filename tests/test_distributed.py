"""Several processes: the same training as one, one voice, one error line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
COMMON: dict[str, Any] = {"precision": "float64", "batch_size": 16}
DENSE = COMMON | {
    "generator_width": 16, "ratio_width": 16, "latent_size": 8, "divergence": "jeffreys", "normalize_h": True,
    "noise_draws": 2, "ratio_steps": 2, "ratio_roll_probability": 0.5, "flip_probability": 0.5,
    "ratio_ema_half_life_images": 500.0,
}  # fmt: skip
MIXER = COMMON | {"ratio_network": "mixer", "ratio_width": 16, "ratio_depth": 2, "generator_width": 16}
TINY = {"backbone": "edm:ddpmpp", "backbone_options": json.dumps({
    "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4], "dropout": 0.1,
})}  # fmt: skip
BACKBONE = COMMON | TINY | {
    "batch_size": 8, "generator": "backbone", "ratio_network": "encoder", "ratio_dropout": 0.2
}  # fmt: skip
EDM2 = COMMON | {
    "batch_size": 8, "backbone": "edm2:xs", "dropout": 0.1,
    "backbone_options": json.dumps({
        "model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [4]
    }),
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "dense": ("train", DENSE, 50),
    "mixer": ("train", MIXER, 10),
    "backbone": ("train", BACKBONE, 4),
    "edm2": ("pretrain", EDM2, 4),
}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "parts": (1, {"micro_batch": 3}),
    "two": (2, {}),
    "two, parts": (2, {"micro_batch": 3}),
    "four": (4, {}),
}
FEWER = ("one", "two", "two, parts")


def ways(case: str) -> dict[str, tuple[int, dict[str, Any]]]:
    return {name: way for name, way in WAYS.items() if case == "dense" or name in FEWER}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """The state after training each case in each way."""
    where = tmp_path_factory.mktemp("ranks")
    plan = [
        {
            "processes": processes, "kind": kind, "options": options | extra, "steps": steps,
            "out": str(where / f"{case}-{way}.safetensors"),
        }
        for case, (kind, options, steps) in CASES.items()
        for way, (processes, extra) in ways(case).items()
    ]  # fmt: skip
    (where / "plan.json").write_text(json.dumps(plan))
    result = subprocess.run(
        [sys.executable, HERE / "ranks.py", where / "plan.json"],
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr, result.stderr
    return {
        (case, way): load_file(where / f"{case}-{way}.safetensors") for case in CASES for way in ways(case)
    }


@pytest.mark.parametrize("case", CASES)
def test_processes_and_parts_make_no_difference(case: str, weights: Any) -> None:
    alone = weights[case, "one"]
    for way in ways(case):
        others = weights[case, way]
        assert others.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=1e-10, msg=lambda text: f"{way}, {name}: {text}")
