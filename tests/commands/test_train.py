"""A small complete run: its files, interruption, resuming, and error messages for bad input."""

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from support.helpers import (
    SMALL,
    checkpoint_tensors,
    command,
    contents,
    newest_checkpoint,
    one_error_line,
    run,
)  # fmt: skip

from diffratio_fast.config.presets import PRESETS
from diffratio_fast.errors import UserError
from diffratio_fast.storage import checkpoints
from diffratio_fast.train import parser, resolve
from diffratio_fast.training import generator_run
from diffratio_fast.training.beginning import Beginning
from diffratio_fast.training.state import checkpoint

STEPS = 23


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run."""
    where = tmp_path_factory.mktemp("finished")
    result = run("train", *SMALL, "--steps", STEPS, "--run-dir", "run", cwd=where)
    assert result.returncode == 0, result.stderr
    return where / "run"


def same_networks(a: Path, b: Path) -> None:
    pairs = [
        (load_file(a / name), load_file(b / name)) for name in ("generator.safetensors", "ratio.safetensors")
    ]
    for first, second in [*pairs, (checkpoint_tensors(a), checkpoint_tensors(b))]:
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key


def log_lines(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without the fields that depend on time."""
    timed = {"seconds", "images_per_second", "loader_share", "memory_bytes", "evaluation_seconds"}
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


@pytest.mark.slow
def test_a_run_writes_the_files_of_the_readme(finished: Path) -> None:
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert config["preset"] == "digits" and config["steps"] == STEPS and config["batch_size"] == 16
    assert {"torch", "python", "device", "git_commit", "diffratio_fast"} <= set(config["environment"])

    lines = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "ratio_loss" in line]
    assert [line["step"] for line in logged] == [4, 8, 12, 16, 20, 23]
    assert [line["images"] for line in logged] == [16 * line["step"] for line in logged]
    for line in logged:
        assert {"seconds", "images_per_second", "ratio_accuracy", "divergence", "gradient_norm"} <= set(line)
        assert line["memory_bytes"] > 0 and 0 <= line["ratio_accuracy"] <= 1 and line["gradient_norm"] > 0
    assert [x["step"] for x in lines if "frechet_distance_validation" in x] == [8, 16, 23]

    pictures = sorted(path.name for path in (finished / "samples").iterdir())
    assert pictures == ["step-00000008.png", "step-00000016.png", "step-00000023.png"]
    picture = np.asarray(Image.open(finished / "samples" / pictures[-1]))
    assert picture.ndim == 3 and picture.min() < picture.max()
    snapshots = {path.name for path in (finished / "snapshots").iterdir()}
    assert snapshots == {
        "best.safetensors",
        "generator-00000008.safetensors",
        "generator-00000016.safetensors",
    }

    summary = json.loads((finished / "summary.json").read_text())
    assert {
        "frechet_distance", "frechet_distance_train", "frechet_distance_floor", "variance_ratio",
        "nearest_train_distance", "nearest_train_distance_test", "class_accuracy", "images_per_second",
        "seconds",
    } <= set(summary)  # fmt: skip
    assert not list(finished.rglob("*.tmp"))


@pytest.mark.slow
def test_a_finished_run_rerun_changes_nothing(finished: Path) -> None:
    before = contents(finished)
    result = run("train", *SMALL, "--steps", STEPS, "--run-dir", "run", cwd=finished.parent)
    assert result.returncode == 0 and "nothing to do" in result.stdout
    assert contents(finished) == before


def wait_for_step(run_dir: Path, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until the log contains ``step`` or a later one, and a checkpoint exists."""
    log = run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (
        log.exists()
        and any(f'"step": {s},' in log.read_text() for s in range(step, STEPS))
        and checkpoints.exists(run_dir / "checkpoint")
    ):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda s: s.name)
def test_interrupted_and_continued_is_bit_identical(
    finished: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    arguments = [*SMALL, "--steps", STEPS, "--run-dir", "run"]
    process = subprocess.Popen(
        command("train", *arguments),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    wait_for_step(tmp_path / "run", 8, process)
    process.send_signal(sent)
    printed, _ = process.communicate(timeout=240)
    if sent is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
    else:
        assert process.returncode == 128 + sent
        assert sent.name in printed and "resumes" in printed
    assert newest_checkpoint(tmp_path / "run").is_dir()
    assert not (tmp_path / "run" / "summary.json").exists()

    result = run("train", *arguments, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "resuming at step" in result.stdout
    same_networks(finished, tmp_path / "run")
    assert log_lines(finished) == log_lines(tmp_path / "run")


def workers(launcher: subprocess.Popen[str]) -> list[int]:
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text()
    return [int(word) for word in children.split()]


@pytest.mark.slow
def test_torchrun_restarts_a_process_that_was_killed(finished: Path, tmp_path: Path) -> None:
    arguments = [*SMALL, "--steps", STEPS, "--run-dir", "run", "--fresh"]  # for the first start only
    launcher = subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1",
         "--max-restarts", "1", "-m", "diffratio_fast.train", *map(str, arguments)],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    wait_for_step(tmp_path / "run", 8, launcher)
    os.kill(workers(launcher)[0], signal.SIGKILL)
    printed, _ = launcher.communicate(timeout=240)
    assert launcher.returncode == 0 and "starting" in printed and "resuming at step" in printed
    same_networks(finished, tmp_path / "run")
    assert log_lines(finished) == log_lines(tmp_path / "run")


def in_process(run_dir: Path, *options: object) -> int:
    arguments = vars(parser().parse_args([*SMALL, "--run-dir", str(run_dir), *map(str, options)]))
    beginning = Beginning(*(arguments.pop(name) for name in ("fresh", "accept_data", "resume_from")))
    del arguments["dry_run"]
    preset, config = resolve(arguments)
    return generator_run.train(preset, config, beginning)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("steps", [1, 4, 5, 22])
def test_stopping_at_any_step_and_asking_for_more_is_the_same_run(
    finished: Path, tmp_path: Path, steps: int
) -> None:
    assert in_process(tmp_path / "run", "--steps", steps, "--lr-schedule", "constant") == 0
    assert in_process(tmp_path / "run", "--steps", STEPS, "--lr-schedule", "constant") == 0
    assert in_process(tmp_path / "other", "--steps", STEPS, "--lr-schedule", "constant") == 0
    same_networks(tmp_path / "other", tmp_path / "run")


@pytest.mark.slow
def test_every_option_of_the_objective_trains(tmp_path: Path) -> None:
    for i, options in enumerate(
        [
            ["--divergence", "jeffreys", "--weight", "dmd", "--normalize-h", "--noise-draws", "3"],
            ["--divergence", "forward_kl", "--weight", "uniform", "--ratio-steps", "2",
             "--optimizer", "adam"],
            ["--divergence", "squared_hellinger", "--weight", "sigma", "--ratio-noise", "lognormal(-1, 1)"],
            ["--divergence", "softened_reverse_kl", "--weight", "bounded", "--precision", "bfloat16"],
            ["--divergence", "reverse_kl", "--precision", "float64", "--ratio-warmup-steps", "2",
             "--generator-ramp-steps", "2", "--lr-schedule", "linear"],
            ["--flip-probability", "0.5", "--ratio-roll-probability", "0.5",
             "--generator-noise", "karras(0.1, 1)", "--ratio-gradient-penalty", "0.1"],
        ]
    ):  # fmt: skip
        directory = tmp_path / str(i)
        assert in_process(directory, "--steps", 6, "--seed", i, *options) == 0
        lines = [line for line in log_lines(directory) if "ratio_loss" in line]
        assert np.isfinite([line["ratio_loss"] for line in lines]).all()
        # resuming restores the state of these options
        assert in_process(directory, "--steps", 9, "--seed", i, *options) == 0


def test_the_generator_is_frozen_while_the_ratio_warms_up(tmp_path: Path) -> None:
    assert in_process(tmp_path / "a", "--steps", 5, "--ratio-warmup-steps", 5) == 0
    assert in_process(tmp_path / "b", "--steps", 1, "--ratio-warmup-steps", 5) == 0
    first, second = (checkpoint_tensors(tmp_path / name) for name in "ab")
    for key, value in first.items():
        if key.startswith(("generator.", "average.")):
            assert torch.equal(value, second[key])
    assert any(not torch.equal(first[key], second[key]) for key in first if key.startswith("ratio."))


@pytest.mark.slow
def test_init_starts_from_another_run(finished: Path, tmp_path: Path) -> None:
    assert in_process(tmp_path / "a", "--steps", 1, "--generator-lr", 0, "--init", finished) == 0
    start, source = (
        load_file(tmp_path / "a/generator.safetensors"),
        load_file(finished / "generator.safetensors"),
    )
    assert all(torch.equal(start[key], source[key]) for key in source)
    result = run("train", *SMALL, "--steps", 1, "--latent-size", 9, "--init", finished, cwd=tmp_path)
    assert "another architecture" in one_error_line(result)


def test_seeds_differ(finished: Path, tmp_path: Path) -> None:
    assert in_process(tmp_path / "run", "--steps", STEPS, "--seed", 1) == 0
    a, b = load_file(finished / "generator.safetensors"), load_file(tmp_path / "run/generator.safetensors")
    assert not torch.equal(a["first.weight"], b["first.weight"])


@pytest.mark.slow
def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    result = run("train", *SMALL, "--dry-run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for word in ("generator", "ratio network", "FLOPs", "memory", "data", "steps", "expected time"):
        assert word in result.stdout
    assert list(tmp_path.iterdir()) == []


def copy_run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run without its completion marker, as a run to resume."""
    target = tmp_path / "run"
    subprocess.run(["cp", "-r", str(finished), str(target)], check=True)
    (target / "summary.json").unlink()
    return target


def damage(checkpoint: Path, how: str) -> None:
    shard, index = next(checkpoint.glob("*.safetensors")), checkpoint / "index.json"
    data = bytearray(shard.read_bytes())
    if how == "truncated":
        shard.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        data[-1000] ^= 1
        shard.write_bytes(data)
    elif how == "missing":
        shard.unlink()
    elif how == "index":
        index.write_text(index.read_text().replace('"step": ', '"step": 1'))
    else:
        index.write_text("not an index")


DAMAGES = ("truncated", "flipped", "missing", "index", "text")


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    finished: Path, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = copy_run(finished, tmp_path)
    names = sorted(path.name for path in (target / "checkpoint").iterdir())
    assert names == ["step-00000020", "step-00000023"]
    damage(newest_checkpoint(target), how)
    assert in_process(target, "--steps", STEPS) == 0
    printed = capsys.readouterr().out
    assert "step-00000023: the checkpoint is damaged" in printed and "resuming from step-00000020" in printed
    assert sorted(path.name for path in (target / "checkpoint").iterdir()) == names
    same_networks(finished, target)
    assert log_lines(finished) == log_lines(target)


@pytest.mark.slow
def test_without_a_whole_checkpoint_nothing_is_touched(finished: Path, tmp_path: Path) -> None:
    target = copy_run(finished, tmp_path)
    for path, how in zip((target / "checkpoint").iterdir(), ("flipped", "text"), strict=True):
        damage(path, how)
    before = contents(target)
    line = one_error_line(run("train", *SMALL, "--steps", STEPS + 1, "--run-dir", "run", cwd=tmp_path))
    assert line.count("damaged") == 2 and "--fresh" in line
    shutil.rmtree(target / "checkpoint")
    (target / "checkpoint").mkdir()
    (target / "checkpoint" / "state.safetensors").write_bytes(b"of an earlier version")
    before = contents(target)
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        in_process(target, "--steps", STEPS + 1)
    assert contents(target) == before


def fill_disk(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Simulate a full disk while the checkpoint of ``step`` is written."""
    write = checkpoint._write_file

    def full(path: Path, content: bytes) -> None:
        if f"{step:08d}" not in str(path):
            return write(path, content)
        path.write_bytes(content[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoint, "_write_file", full)


def test_a_full_disk_during_a_save(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_disk(monkeypatch, 10)
    with pytest.raises(UserError, match=r"step 10 could not be saved .No space left.*step-00000005 is kept"):
        in_process(tmp_path / "run", "--steps", STEPS, "--on-save-failure", "stop")
    assert [path.name for path in (tmp_path / "run" / "checkpoint").iterdir()] == ["step-00000005"]
    assert in_process(tmp_path / "run", "--steps", STEPS) == 0
    assert "warning: the checkpoint of step 10 could not be saved" in capsys.readouterr().out
    same_networks(finished, tmp_path / "run")
    assert log_lines(finished) == log_lines(tmp_path / "run")


def test_a_disk_too_full_for_the_log(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_FSIZE stops a file's growth, as a full disk does; buffered data does not matter."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    monkeypatch.setattr(checkpoint, "_write_file", lambda path, content: path.write_bytes(content))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limit[1]))
        with pytest.raises(UserError, match=r"cannot write .*: File too large"):
            in_process(tmp_path / "run", "--steps", STEPS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert in_process(tmp_path / "run", "--steps", STEPS) == 0
    assert log_lines(finished) == log_lines(tmp_path / "run")


@pytest.mark.slow
def test_other_settings_are_refused_and_nothing_changes(finished: Path, tmp_path: Path) -> None:
    target = copy_run(finished, tmp_path)
    before = contents(target)
    line = one_error_line(run("train", *SMALL, "--seed", 8, "--run-dir", "run", cwd=tmp_path))
    assert "seed 0 -> 8" in line and "--fresh" in line
    assert contents(target) == before


def test_fresh_starts_over_and_removes_only_a_runs_files(finished: Path, tmp_path: Path) -> None:
    target = copy_run(finished, tmp_path)
    (target / "notes.txt").write_text("mine")
    assert in_process(target, "--steps", 2, "--seed", 4, "--fresh") == 0
    assert (target / "notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (target / "samples").iterdir()) == ["step-00000002.png"]
    assert log_lines(target)[0]["step"] == 2


@pytest.mark.slow
def test_results_without_a_checkpoint_are_not_overwritten(finished: Path, tmp_path: Path) -> None:
    target = copy_run(finished, tmp_path)
    shutil.rmtree(target / "checkpoint")
    before = contents(target)
    line = one_error_line(run("train", *SMALL, "--run-dir", "run", cwd=tmp_path))
    assert "without a checkpoint" in line
    assert contents(target) == before


@pytest.mark.slow
def test_two_processes_do_not_train_in_one_directory(tmp_path: Path) -> None:
    import fcntl

    (tmp_path / "run").mkdir()
    with open(tmp_path / "run" / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = one_error_line(run("train", *SMALL, "--steps", 1, "--run-dir", "run", cwd=tmp_path))
    assert "another process" in line


@pytest.mark.slow
def test_an_unwritable_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("here")
    line = one_error_line(run("train", *SMALL, "--steps", 1, "--run-dir", "file/run", cwd=tmp_path))
    assert "cannot create file/run" in line
    assert (tmp_path / "file").read_text() == "here"


def test_a_directory_without_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root, as in a container, can write anywhere
    with pytest.raises(UserError, match="permission denied"):
        in_process(tmp_path / "run", "--steps", 1)
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--generator-noise", "loguniform(0.01, 9)"], "outside --ratio-noise"),
        (["--ratio-noise", "normal(0, 1)"], "is not known"),
        (["--data", "cifar"], "no such data set"),
        (["--device", "cuda:99"], "--device cuda:99"),
        (["--device", "tpu"], "--device tpu"),
        (["--init", "nowhere.safetensors"], "no such file"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--no-such-option"], "unrecognized"),
    ],
)
def test_bad_input_leaves_nothing_behind(tmp_path: Path, options: list[str], expected: str) -> None:
    line = one_error_line(run("train", *SMALL, "--steps", 1, *options, cwd=tmp_path))
    assert expected in line
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_divergence_is_reported_and_the_last_checkpoint_stays(tmp_path: Path) -> None:
    line = one_error_line(
        run("train", *SMALL, "--ratio-lr", "1e30", "--steps", 40, "--run-dir", "run", cwd=tmp_path)
    )
    assert "diverged" in line and "learning rates" in line


def test_presets_stop_by_steps() -> None:
    assert all("steps" in values or name == "digits" for name, values in PRESETS.items())
