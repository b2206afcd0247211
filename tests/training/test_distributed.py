"""Several processes: the same training as one; output and errors once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, TESTS
from support.helpers import SMALL, checkpoint_tensors, newest_checkpoint

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
    "rounded": ("train", MIXER | {"precision": "float32", "ratio_lr": 0.01}, 1),
}
WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "parts": (1, {"micro_batch": 3}),
    "two": (2, {}),
    "two, parts": (2, {"micro_batch": 3}),
    "four": (4, {}),
    "fsdp": (2, {"parallel": "fsdp", "micro_batch": 3}),
}
ROUNDED = {"two": (2, {}), "two, bfloat16": (2, {"reduce_dtype": "bfloat16"})}
FEWER = ("one", "two", "two, parts", "fsdp")
CAPTURED = ("mixer", "backbone")
"""Cases that are also run with recorded steps."""


def ways(case: str) -> dict[str, tuple[int, dict[str, Any]]]:
    if case == "rounded":
        return ROUNDED
    chosen = {name: way for name, way in WAYS.items() if case == "dense" or name in FEWER}
    return chosen | ({"two, captured": (2, {})} if case in CAPTURED else {})


Statuses = list[list[int]]


def run_plan(where: Path, plan: list[dict[str, Any]]) -> Statuses:
    """Exit statuses of the processes of each entry; see ranks.py."""
    (where / "plan.json").write_text(json.dumps(plan))
    result = subprocess.run(
        [sys.executable, "-m", "support.ranks", where / "plan.json"],
        capture_output=True, text=True, timeout=300, check=False, cwd=where,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(TESTS), str(ROOT)))},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    statuses: Statuses = json.loads(result.stdout)
    return statuses


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """The state after training each case with each launch."""
    where = tmp_path_factory.mktemp("ranks")
    plan = [
        {
            "processes": processes, "kind": kind, "options": options | extra, "steps": steps,
            "taped": way == "two, captured", "out": str(where / f"{case}-{way}.safetensors"),
        }
        for case, (kind, options, steps) in CASES.items()
        for way, (processes, extra) in ways(case).items()
    ]  # fmt: skip
    assert not any(any(statuses) for statuses in run_plan(where, plan))
    return {
        (case, way): load_file(where / f"{case}-{way}.safetensors") for case in CASES for way in ways(case)
    }


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case != "rounded"])
def test_processes_and_parts_make_no_difference(case: str, weights: Any) -> None:
    alone = weights[case, "one"]
    for way in ways(case):
        others = weights[case, way]
        assert others.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(others[name], value, rtol=0, atol=1e-10, msg=f"{way}: {name}")


def test_gradients_averaged_in_bfloat16_are_rounded(weights: Any) -> None:
    whole, rounded = weights["rounded", "two"], weights["rounded", "two, bfloat16"]
    far = {name: float((whole[name] - rounded[name]).abs().max()) for name in whole}
    ratio = [far[name] for name in far if name.startswith("ratio.")]
    assert 0 < max(ratio) <= 2 * 0.01  # Adam's steps have the size of the learning rate; signs may differ


@pytest.mark.slow
def test_only_rank_0_writes_and_prints(tmp_path: Path) -> None:
    train = ["train", *SMALL, "--run-dir", "run"]
    statuses = run_plan(
        tmp_path,
        [
            {"processes": 3, "command": [*train, "--steps", "9"], "out": "uneven"},
            {"processes": 2, "command": [*train, "--steps", "9", "--data", "nowhere"], "out": "nowhere"},
            {"processes": 2, "command": [*train, "--steps", "9"], "out": "whole"},
            {"processes": 2, "command": [*train, "--steps", "9"], "out": "again"},
            {"processes": 1, "command": [*train, "--steps", "11"], "out": "longer"},
        ],
    )
    assert statuses == [[2, 2, 2], [2, 2], [0, 0], [0, 0], [0]]

    def printed(name: str) -> list[str]:
        files = sorted(tmp_path.glob(f"{name}.*"))
        assert all(file.read_text() == "" for file in files[1:])
        return files[0].read_text().splitlines()

    assert printed("uneven") == ["error: --batch-size 16: expected a multiple of the 3 processes"]
    (line,) = printed("nowhere")
    assert "no such data set" in line
    assert "starting on 2 processes" in printed("whole")[0] and "nothing to do" in printed("again")[0]
    changed, resumed = printed("longer")[:2]
    assert "processes 2 -> 1" in changed and "resuming at step 9" in resumed
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line["step"] for line in lines if "ratio_loss" in line]
    assert logged == [4, 8, 9, 11]
    assert all(line["images"] == 16 * line["step"] for line in lines if "ratio_loss" in line)


@pytest.mark.slow
def test_a_checkpoint_of_any_number_of_processes_continues_on_another(tmp_path: Path) -> None:
    base = ["train", *SMALL, "--precision", "float64", "--refit-steps", "0", "--lr-schedule", "constant"]

    def part(run_dir: str, processes: int, steps: int, parallel: str = "ddp") -> dict[str, Any]:
        command = [*base, "--run-dir", run_dir, "--steps", str(steps), "--parallel", parallel]
        return {"processes": processes, "command": command, "out": f"{run_dir}-{steps}"}

    plan = [
        part("one", 1, 12),
        part("up", 1, 6), part("up", 2, 12),
        part("down", 2, 7), part("down", 1, 12),
        part("whole", 2, 6, "fsdp"), part("whole", 2, 9, "ddp"), part("whole", 1, 12),
        part("cut", 1, 6), part("cut", 2, 9, "fsdp"), part("cut", 2, 12, "fsdp"),
    ]  # fmt: skip
    statuses = run_plan(tmp_path, plan)
    assert not any(map(any, statuses)), [path.read_text() for path in sorted(tmp_path.glob("*.0"))]
    wanted = checkpoint_tensors(tmp_path / "one")
    generator = load_file(tmp_path / "one" / "generator.safetensors")
    for name in ("up", "down", "whole", "cut"):
        found: dict[str, torch.Tensor] = {}
        for file in sorted(newest_checkpoint(tmp_path / name).glob("*.safetensors")):
            for key, value in load_file(file).items():  # parts are cut along the first axis
                found[key] = torch.cat((found[key], value)) if key in found else value
        assert found.keys() == wanted.keys()
        for key, value in wanted.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-10, msg=f"{name}: {key}")
        for key, value in load_file(tmp_path / name / "generator.safetensors").items():
            torch.testing.assert_close(value, generator[key], rtol=0, atol=1e-6, msg=f"{name}: {key}")
    assert len(list(newest_checkpoint(tmp_path / "up").glob("*.safetensors"))) == 2
