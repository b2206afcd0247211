"""The benchmark command: its files, its schema, its errors. Timings are not checked."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from support import ROOT

from diffratio_fast.errors import UserError

sys.path.insert(0, str(ROOT))
from benchmarks import __main__ as main

COMMON = {
    "benchmark", "op", "shape", "dtype", "provider", "pass", "median_s", "q20_s", "q80_s", "checked",
}  # fmt: skip
ROW = COMMON | {"peak_bytes", "bytes_per_s", "flop_per_s"}


def benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "nonsense"], "invalid choice: 'nonsense'"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
        (["--repeats", "0"], "must be at least 1"),
        (["--threads", "two"], "invalid positive value"),
        (["--json", "/nonexistent/folder/file.json"], "not a file in a writable directory"),
        (["--nonsense"], "unrecognized arguments"),
        *([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA device is visible")]),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        main.main(arguments)
    assert "\n" not in str(caught.value)


def test_a_bad_option_is_one_line_and_status_2():
    result = benchmarks("--only", "nonsense")
    lines = [line for line in result.stderr.splitlines() if not line.startswith("diffratio_fast: ")]
    assert result.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), result.stderr


def test_help():
    result = benchmarks("--help")
    assert result.returncode == 0 and "noise" in result.stdout


@pytest.mark.slow
def test_a_small_run_writes_the_schema(tmp_path):
    """The real harness and the real cases, at small shapes."""
    code = f"""
import benchmarks.bench_noise as noise, benchmarks.harness as harness, benchmarks.__main__ as main
noise.SHAPES = ((4, 3, 8, 8),)
harness.MAX_ROTATION = 1 << 16
noise.torch.compile = lambda f, **_: f
harness.ceilings = lambda device: {{"copy_bytes_per_s": 1.0, "matmul_flop_per_s": 1.0}}
options = ["--only", "noise", "--device", "cpu", "--repeats", "3"]
raise SystemExit(main.main([*options, "--json", {str(tmp_path / "b.json")!r}]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    content = json.loads((tmp_path / "b.json").read_text())
    assert set(content) == {"environment", "ceilings", "rows", "failures", "complete"}
    assert [p.name for p in tmp_path.iterdir()] == ["b.json"]
    rows = content["rows"]
    # types; one half: 3 providers; a pair, forward and full: 3 with separate and 4 with shared noise
    assert len(rows) == 2 * (3 + 2 * (3 + 4))
    for row in rows:
        assert set(row) == ROW | {"repeats"} and row["repeats"] == 3
        assert row["checked"] is True and row["median_s"] > 0
    fused = {row["op"]: row for row in rows if row["provider"] == "fused" and row["dtype"] == "float32"}
    one = 4 * 3 * 8 * 8 * 4
    assert one <= fused["add_noise"]["peak_bytes"] <= 3 * one
    assert "eager/fused" in result.stdout


def test_committed_results_name_no_machine():
    files = list((ROOT / "benchmarks" / "results").glob("*.json"))
    assert files
    for file in files:
        text = file.read_text()
        content = json.loads(text)
        if "benchmark" not in content.get("rows", [{}])[0]:  # a study: results that are not times
            assert "median_s" not in text and len(content) > 1
        else:
            for row in content["rows"]:
                if row["benchmark"] == "presets":  # complete steps: no reference to check them against
                    assert set(row) >= COMMON - {"checked"}
                    continue
                # these two add further fields
                own = row["benchmark"] in ("data", "methods")
                assert set(row) >= COMMON if own else set(row) - {"repeats"} == ROW
                assert row["checked"] is True
            assert content["environment"]["device"]
        assert "/home" not in text and "/root" not in text and "/tmp" not in text
        assert "hostname" not in text
