"""The commands for a GPU, run without one: checks, benchmarks, first run, training, parts."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.helpers import SMALL

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import __main__ as benchmarks  # noqa: E402
from benchmarks import gpu_checks, harness, kernel  # noqa: E402
from benchmarks.gpu import first, pieces, training  # noqa: E402
from benchmarks.gpu.jobs import Job, Jobs  # noqa: E402
from diffratio_fast.errors import UserError  # noqa: E402
from diffratio_fast.runs.paths import RunPaths  # noqa: E402

CHECKS = """
import os
def check_good(): pass
def check_wrong(): assert 1 == 2, "one is not two"
def check_crash(): os._exit(7)
def check_after(): pass
def check_of_a_gpu(): raise RuntimeError("not reached")
CHECKS = [check_good, check_wrong, check_crash, check_after, check_of_a_gpu]
CUDA_ONLY = (check_of_a_gpu,)
"""


@pytest.mark.slow
def test_a_check_that_fails_or_crashes_does_not_stop_the_others(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "sample_checks.py").write_text(CHECKS)
    monkeypatch.setattr(gpu_checks, "FOLDER", tmp_path)
    failures = gpu_checks.run(["sample"], device="cpu", path=tmp_path / "checks.json")
    assert failures == [
        "sample: check_wrong: AssertionError: one is not two",
        "sample: check_crash: its process ended with status 7",
    ]
    rows = json.loads((tmp_path / "checks.json").read_text())
    assert [row["check"] for row in rows] == ["check_good", "check_wrong", "check_crash", "check_after"]


def test_checks_that_no_time_is_left_for_are_named(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "sample_checks.py").write_text(
        "def check_one(): pass\nCHECKS = [check_one]\nCUDA_ONLY = ()\n"
    )
    monkeypatch.setattr(gpu_checks, "FOLDER", tmp_path)
    failures = gpu_checks.run(["sample"], device="cpu", deadline=time.monotonic() - 1)
    assert failures == ["sample: check_one: not run: out of time"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise", "ratio"])
def test_the_checks_themselves_pass_on_the_cpu(name: str, monkeypatch: Any) -> None:
    """At small shapes: the code that a GPU runs has run on the CPU."""
    module = gpu_checks.load(name)
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))
    if name == "ratio":
        monkeypatch.setattr(module, "SHAPES", {k: module.SHAPES[k] for k in ("digits", "odd")})
        module.SHAPES["CIFAR-10"] = module.SHAPES["digits"]
        monkeypatch.setattr(module, "MANY", ("odd",))
    slow = {"check_every_radius_word", "check_determinism", "check_compiles"}
    for check in sorted(set(gpu_checks.chosen(module, "cpu")) - slow):
        getattr(module, check)()


def test_a_wrong_result_fails_the_parity_check(monkeypatch: Any) -> None:
    module = gpu_checks.load("ratio")
    monkeypatch.setattr(module, "DEVICE", torch.device("cpu"))

    def scaled(p: Any, which: Any) -> list[torch.Tensor]:
        return [x * (1.04 if which is module.ops else 1) for x in module.score_difference(p, which)]

    with pytest.raises(AssertionError, match="scaled, result 0: error 4"):
        module.compare(lambda seed: module.Problem("digits", seed=seed), scaled)


def case(op: str, seconds: float = 0.0, wrong: bool = False) -> harness.Case:
    def check() -> None:
        assert not wrong, f"{op} differs"

    def call(_: int) -> torch.Tensor:
        time.sleep(seconds)
        return torch.zeros(4)

    return harness.Case(op, "[4]", "float32", "forward", {"fused": call, "eager": call}, check, 16.0)


def run_benchmarks(
    cases: dict[str, list[Any]], path: Path, monkeypatch: Any, *options: str
) -> tuple[int, Any]:
    """``python -m benchmarks`` on these cases; a string among them is raised as an error of the setup."""

    def module(name: str) -> SimpleNamespace:
        def generate(_: harness.Settings) -> Iterator[harness.Case]:
            for one in cases[name.removeprefix("benchmarks.bench_")]:
                if isinstance(one, str):
                    raise RuntimeError(one)
                yield one

        return SimpleNamespace(cases=generate)

    monkeypatch.setattr(benchmarks, "NAMES", benchmarks.ordered(set(cases)))
    monkeypatch.setattr(benchmarks.importlib, "import_module", module)
    monkeypatch.setattr(harness, "ceilings", lambda _: {"copy_bytes_per_s": 1.0, "matmul_flop_per_s": 1.0})
    arguments = ["--device", "cpu", "--repeats", "4", "--json", str(path), *options]
    return benchmarks.main(arguments), json.loads(path.read_text())


def test_benchmarks_go_on_after_failures_and_print_them_last(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    cases = {
        "methods": [case("last")],
        "noise": [case("first"), case("bad", wrong=True), case("second")],
        "ratio": ["no memory"],
    }
    status, content = run_benchmarks(cases, tmp_path / "b.json", monkeypatch)
    assert status == 1 and content["complete"]
    assert [row["op"] for row in content["rows"][::2]] == ["first", "second", "last"]
    assert content["failures"] == ["noise: bad [4] float32 forward: bad differs", "ratio: no memory"]
    assert capsys.readouterr().out.splitlines()[-2:] == [f"FAILED {line}" for line in content["failures"]]


def test_a_time_limit_keeps_what_was_measured(tmp_path: Path, monkeypatch: Any) -> None:
    cases = {"noise": [case("quick"), case("slow", seconds=0.4), case("never")], "ratio": [case("later")]}
    status, content = run_benchmarks(cases, tmp_path / "b.json", monkeypatch, "--time-limit", "2")
    assert status == 0 and not content["complete"]
    assert {row["op"] for row in content["rows"]} <= {"quick", "slow"} and content["rows"]
    assert all(row["repeats"] >= harness.FEWEST for row in content["rows"])


def test_results_are_on_disk_after_each_case(tmp_path: Path, monkeypatch: Any) -> None:
    seen: list[int] = []

    def look() -> None:
        seen.append(len(json.loads((tmp_path / "b.json").read_text())["rows"]))

    second, third = case("second"), case("third")
    second.check = third.check = look
    run_benchmarks({"noise": [case("first"), second, third]}, tmp_path / "b.json", monkeypatch)
    assert seen == [2, 4]


@pytest.mark.parametrize(
    ("op", "phase"), [(op, phase) for op in kernel.KERNELS for phase in kernel.KERNELS[op]]
)
def test_a_single_call_for_the_profiler(op: str, phase: str, capsys: Any) -> None:
    arguments = ["--op", op, "--phase", phase, "--size", "digits", "--batch", "2", "--device", "cpu"]
    assert kernel.main(arguments) == 0
    assert capsys.readouterr().out.startswith(f"{op} {phase}, digits, B=2: ")


def test_kernels_of_the_profiler_exist() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "csrc/cuda").rglob("*.cuh"))
    for phases in kernel.KERNELS.values():
        assert all(f" {name}(" in sources for name in phases.values())
    with pytest.raises(UserError, match="has the phases samples, products, one-launch"):
        kernel.main(["--op", "ratio_loss", "--phase", "all", "--device", "cpu"])


def test_jobs_end_in_time_and_leave_a_table(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path / "out", time.monotonic() + 60)
    python = sys.executable
    assert jobs.run(Job("good", [python, "-c", "print('here')"], 30)) == "ok"
    assert jobs.run(Job("bad", [python, "-c", "raise SystemExit(5)"], 30)) == "status 5"
    assert jobs.run(Job("endless", [python, "-c", "import time; time.sleep(99)"], 1)) == "timed out"
    assert jobs.run(Job("enough", ["sleep", "99"], 30), until=lambda: True) == "ok"
    assert (
        jobs.run(Job("absent", ["ncu"], 30, needs="no-such-program"))
        == "skipped: no-such-program is not installed"
    )
    jobs.deadline = time.monotonic()
    assert jobs.run(Job("late", [python], 30)) == "skipped: no time left"
    rows = json.loads((tmp_path / "out" / "jobs.json").read_text())
    assert [row["job"] for row in rows] == ["good", "bad", "endless", "enough", "absent", "late"]
    assert (tmp_path / "out" / "good.log").read_text() == "here\n"
    assert jobs.finish() == 1


def test_the_first_run_calls_the_tools_as_documented(tmp_path: Path, monkeypatch: Any) -> None:
    """With stand-in programs that record their arguments; ncu also writes its file."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ncu", "compute-sanitizer"):
        program = tools / name
        program.write_text(
            f'#!/bin/sh\necho "$(basename $0) $*" >> {tmp_path}/calls\n'
            'while [ $# -gt 0 ]; do [ "$1" = --export ] && touch "$2.ncu-rep"; shift; done\n'
        )
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    out = tmp_path / "out"
    arguments = ["--out", str(out), "--device", "cpu", "--only", "sanitizer", "profiles"]
    assert first.main(arguments) == 0
    assert json.loads((out / "failed.json").read_text()) == []
    calls = (tmp_path / "calls").read_text().splitlines()
    for op, phases in kernel.KERNELS.items():
        for phase, name in phases.items():
            (line,) = (c for c in calls if f"--op {op} --phase {phase}" in c)
            assert (
                f"--kernel-name regex:{name} --launch-count 1" in line and "--profile-from-start off" in line
            )
    checked = [c for c in calls if c.startswith("compute-sanitizer")]
    assert {c.split("--tool ")[1].split()[0] for c in checked} == set(first.TOOLS)
    assert len([c for c in calls if c.startswith("ncu --import")]) == sum(map(len, kernel.KERNELS.values()))


def test_a_training_is_measured_after_its_warm_up(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    assert training.numbers(metrics) == {"lines": 0}
    lines = [
        {
            "step": n,
            "images_per_second": rate,
            "memory_bytes": n << 30,
            "loader_share": 0.5,
            "ratio_loss": 1.0,
        }
        for n, rate in enumerate((1.0, 2.0, 100.0, 101.0, 102.0, 103.0))
    ]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 5, "sigma": []}]))
    found = training.numbers(metrics)
    assert found["images_per_second"] == 101.5 and found["peak_memory_bytes"] == 5 << 30
    row = {"preset": "cifar10", "mode": "eager", "outcome": "ok", **found}
    assert "| `cifar10` | eager | 101.5 | 5.00 | 50.0% |" in training.table([row])


@pytest.mark.slow
def test_training_presets_tiny_on_the_cpu(tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["--device", "cpu", "--tiny", "--out", str(out), "--mode", "eager", "--lines", "2"]
    assert training.main(arguments) == 0
    rows = json.loads((out / "training.json").read_text())
    assert [row["preset"] for row in rows] == list(training.PRESETS)
    assert all(row["outcome"] == "ok" and row["images_per_second"] > 0 for row in rows), rows


@pytest.mark.slow
def test_a_training_in_pieces_continues_elsewhere(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    train = ["digits", *SMALL, "--log-every", "1", "--eval-every", "100000", "--steps"]
    one, two, out = tmp_path / "one", tmp_path / "two", tmp_path / "out"
    log = RunPaths(one).metrics
    monkeypatch.setattr(pieces, "due", lambda end: log.exists() and log.stat().st_size > 0)
    assert pieces.main(["--run-dir", str(one), "--out", str(out), *train, "1000000"]) == 0
    monkeypatch.undo()
    saved = pieces.newest_checkpoint(RunPaths(out / "run"))
    assert saved is not None and saved.name in capsys.readouterr().out
    step = int(saved.name.removeprefix("step-"))
    arguments = ["--run-dir", str(two), "--from", str(out / "run"), "--out", str(tmp_path / "out2")]
    assert pieces.main([*arguments, *train, str(step + 3)]) == 0
    assert "finished" in capsys.readouterr().out
    lines = [json.loads(line) for line in (two / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "ratio_loss" in line]
    assert steps == list(range(1, step + 4))


def test_pieces_refuse_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no run with a checkpoint"):
        pieces.main(
            [
                "--run-dir",
                str(tmp_path / "run"),
                "--from",
                str(tmp_path),
                "--out",
                str(tmp_path / "o"),
                "digits",
            ]
        )
