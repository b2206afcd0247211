"""Resuming: from a run's own checkpoint and data; or from another run's, with other options."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from support.data_cases import image_folder
from support.helpers import SMALL

from diffratio_fast import command, evaluate, prepare, pretrain, sample, train
from diffratio_fast.errors import UserError
from diffratio_fast.storage.checkpoints import Retention, candidates, kept, read_index, step_of
from diffratio_fast.training.run import Run

OPTIONS = [*SMALL, "--eval-every", "100", "--snapshot-every", "100", "--checkpoint-every", "2"]


def trained(where: Path, *more: object) -> Path:
    arguments = [*OPTIONS, "--run-dir", where, *more]
    assert train.main([str(argument) for argument in arguments]) == 0
    return where


def error(*more: object) -> str:
    with pytest.raises(UserError) as caught:
        train.main([str(argument) for argument in (*OPTIONS, *more)])
    return str(caught.value)


def steps(run: Path) -> list[int]:
    return sorted(step_of(path.name) for path in candidates(run / "checkpoint"))


def history(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return prepared(tmp_path / "a", "data", tmp_path, 3)


def prepared(images: Path, name: str, where: Path, classes: int) -> Path:
    image_folder(images, classes, 20)
    out = where / name
    assert prepare.main([str(images), str(out), "--validation", "16", "--test", "16"]) == 0
    return out


def test_other_data_of_the_same_shape_are_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(tmp_path / "run", "--data", data, "--steps", 4)
    moved = tmp_path / "moved"
    shutil.move(data, moved)
    other = prepared(tmp_path / "b", "data", tmp_path, 3)
    shard = other / "shard-00000.bin"
    content = bytearray(shard.read_bytes())
    shutil.rmtree(other)
    folder = tmp_path / "b"
    first = sorted(folder.rglob("*.png"))[0]
    first.write_bytes(sorted(folder.rglob("*.png"))[-1].read_bytes())  # one image is replaced
    assert prepare.main([str(folder), str(other), "--validation", "16", "--test", "16"]) == 0
    assert bytes(content) != (other / "shard-00000.bin").read_bytes()
    index = read_index(candidates(run / "checkpoint")[0])
    printed = error("--run-dir", run, "--data", data, "--steps", 6)
    assert index["identity"]["data"] in printed and "--accept-data" in printed and str(data) in printed
    assert steps(run)[-1] == 4
    trained(run, "--data", data, "--steps", 6, "--accept-data")
    assert history(run)[-1]["data"] != index["identity"]["data"]
    shutil.rmtree(other)
    shutil.move(moved, data)
    assert "trained on data with the digest" in error("--run-dir", run, "--data", data, "--steps", 8)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    one, two = (trained(tmp_path / name, "--steps", 2, "--seed", seed) for seed, name in enumerate("ab"))
    shutil.rmtree(one / "checkpoint")
    shutil.copytree(two / "checkpoint", one / "checkpoint")
    printed = error("--run-dir", one, "--steps", 4)
    assert str(history(one)[0]["run"]) in printed and str(history(two)[0]["run"]) in printed
    (one / "history.jsonl").unlink()  # then the configuration has the run ID
    assert "seed 1 -> 0" in error("--run-dir", one, "--steps", 4)


def test_a_start_that_came_to_no_checkpoint_leaves_the_run_its_name(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--steps", 2)
    first = history(run)[0]["run"]
    shutil.rmtree(run / "checkpoint")
    for path in (run / "summary.json", *run.glob("*.safetensors")):
        path.unlink()
    trained(run, "--steps", 2)
    trained(run, "--steps", 4)
    assert [line["run"] for line in history(run)] == [first] * 3
    trained(run, "--steps", 2, "--fresh")
    assert len(history(run)) == 1 and history(run)[0]["run"] != first


def test_changed_versions_are_reported_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", "--steps", 2)
    lines = history(run)
    assert isinstance(lines[0]["environment"], dict)
    lines[0]["environment"]["torch"] = "1.0.0"
    (run / "history.jsonl").write_text(json.dumps(lines[0]) + "\n")
    capsys.readouterr()
    trained(run, "--steps", 4)
    printed = capsys.readouterr().out
    assert f"the environment has changed (torch 1.0.0 -> {torch.__version__})" in printed
    assert [line["step"] for line in history(run)] == [0, 2]
    assert history(run)[0]["environment"] == lines[0]["environment"]
    assert history(run)[0]["run"] == history(run)[1]["run"]


def test_a_new_run_from_a_checkpoint_of_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained(tmp_path / "run", "--steps", 6, "--keep-checkpoints", 3, "--log-every", 1)
    same = trained(tmp_path / "same", "--steps", 6, "--resume-from", f"{run}@4", "--log-every", 1)
    for name in ("generator", "ratio"):
        a, b = (load_file(where / f"{name}.safetensors") for where in (run, same))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert [json.loads(line)["step"] for line in (same / "metrics.jsonl").read_text().splitlines()][:5] == [
        1, 2, 3, 4, 5
    ]  # fmt: skip
    capsys.readouterr()
    other = tmp_path / "other"
    options = ["--resume-from", f"{run}@4", "--generator-lr", "0.5", "--divergence", "jeffreys"]
    assert train.main([*options, "--run-dir", str(other), "--steps", "6"]) == 0
    printed = capsys.readouterr().out
    assert "divergence jensen_shannon -> jeffreys" in printed and "generator_lr 0.001 -> 0.5" in printed, (
        printed
    )
    first = history(other)[0]
    assert first["resumed_from"] == {"run": history(run)[0]["run"], "directory": str(run), "step": 4}
    assert first["changed"] == {"generator_lr": [0.001, 0.5], "divergence": ["jensen_shannon", "jeffreys"]}
    config = yaml.safe_load((other / "config.yaml").read_text())
    assert config["batch_size"] == 16 and config["divergence"] == "jeffreys"  # the others are the run's
    assert train.main([*options, "--run-dir", str(other), "--steps", "8"]) == 0  # resumes itself
    assert "at step 6" in capsys.readouterr().out and len(history(other)) == 2


def test_what_cannot_be_resumed_from(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "--steps", 4)
    new = ["--run-dir", tmp_path / "new"]
    assert "none at step 3 (available: 2, 4)" in error(*new, "--resume-from", f"{run}@3")
    assert "expected a run directory" in error(*new, "--resume-from", tmp_path / "none")
    assert "--run-dir" in error("--resume-from", run)
    assert "is the same run" in error("--run-dir", run, "--resume-from", run)
    assert "does not match this run" in error(*new, "--resume-from", run, "--generator-width", "17")
    assert not (tmp_path / "new").exists()


def test_which_checkpoints_are_kept() -> None:
    steps = list(range(2, 21, 2))
    assert kept(steps, Retention(newest=3), None) == {16, 18, 20}
    assert kept(steps, Retention(newest=1, every_images=80, batch_size=16), None) == {6, 10, 16, 20}
    assert kept(steps, Retention(newest=1, best=True), 8) == {8, 20}
    assert kept(steps, Retention(newest=1), 8) == {20}
    assert kept(steps, Retention(newest=1, best=True), 7) == {20}


def test_a_run_keeps_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(tmp_path / "run", "--steps", 10, "--keep-checkpoints", 1, "--keep-every-images", 64)
    assert steps(run) == [4, 8, 10]
    run = trained(
        tmp_path / "best", "--steps", 9, "--keep-checkpoints", 1, "--keep-best", "--checkpoint-every", 100,
        "--eval-every", 3,
    )  # fmt: skip
    best = json.loads((run / "summary.json").read_text())["best"]["step"]
    assert steps(run) == sorted({best, 9})


def test_checkpoints_by_the_clock(tmp_path: Path) -> None:
    run = trained(
        tmp_path / "run", "--steps", 6, "--checkpoint-every", 1000, "--checkpoint-minutes", 1e-9,
        "--keep-checkpoints", 100,
    )  # fmt: skip
    assert steps(run) == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 0)]
)
def test_an_interrupted_run_is_saved_sampled_and_evaluated(
    sent: signal.Signals, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    advance = Run.advance

    def wrapped(self: Run, batches: object) -> None:
        advance(self, batches)  # type: ignore[arg-type]
        if self.state.step == 3:
            os.kill(os.getpid(), sent)

    assert threading.current_thread() is threading.main_thread()
    monkeypatch.setattr(Run, "advance", wrapped)
    run = tmp_path / "run"
    arguments = [*OPTIONS, "--steps", "50", "--run-dir", str(run)]
    monkeypatch.setattr("sys.argv", ["train", *arguments])
    with pytest.raises(SystemExit) as ended:
        command.run(train.main)
    assert (ended.value.code or 0) == status
    assert f"{sent.name}: saved at step 3" in capsys.readouterr().out
    if status != 143:
        return
    assert sample.main([str(run), "--count", "4", "--out", str(tmp_path / "grid.png")]) == 0
    assert "using the average in checkpoint step-00000003" in capsys.readouterr().err
    options = ["--count", "80", "--seeds", "0", "--features", "pixels", "--metrics", "frechet", "--json"]
    assert evaluate.main([str(run), *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["subject"]["trained"]["step"] == 3


def test_a_denoiser_has_no_generator_to_sample(tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--backbone-options", '{"model_channels": 16, "channel_mult": [1], "num_blocks": 1}']
    options += ["--device", "cpu", "--threads", "1", "--batch-size", "8", "--steps", "1"]
    assert pretrain.main([*options, "--run-dir", str(run)]) == 0
    (run / "summary.json").unlink()
    with pytest.raises(UserError, match="no description of a generator"):
        sample.main([str(run), "--out", str(tmp_path / "grid.png")])
