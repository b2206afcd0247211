"""An untrusted run directory, with symbolic links that redirect writes to files elsewhere."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from support.helpers import SMALL

from diffratio_fast import sample, train
from diffratio_fast.errors import UserError
from diffratio_fast.report.__main__ import main as report_main
from diffratio_fast.storage import writing

PRECIOUS = b"not to be touched"
FILES = (
    "report.html", "config.yaml", "metrics.jsonl", "history.jsonl", "summary.json", "measurements.json",
    "generator.safetensors", "neighbours.png",
)  # fmt: skip


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_bytes(PRECIOUS)
    return path


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def resume(run: Path) -> int:
    return train.main([*SMALL, "--steps", "6", "--run-dir", str(run)])


def test_links_in_place_of_files_and_of_their_temporaries(run: Path, victim: Path) -> None:
    for name in FILES:
        os.symlink(victim, run / f"{name}.tmp")
        if name not in ("config.yaml", "history.jsonl", "metrics.jsonl"):  # those are read first
            (run / name).unlink(missing_ok=True)
            os.symlink(victim, run / name)
    assert resume(run) == 0
    assert report_main([str(run)]) == 0
    assert victim.read_bytes() == PRECIOUS
    assert not (run / "report.html").is_symlink() and not (run / "summary.json").is_symlink()


def test_the_log_is_not_appended_to_through_a_link(run: Path, victim: Path) -> None:
    (run / "metrics.jsonl").unlink()
    os.symlink(victim, run / "metrics.jsonl")
    assert resume(run) == 0
    assert victim.read_bytes() == PRECIOUS


@pytest.mark.parametrize("name", ["checkpoint", "samples", "snapshots"])
def test_directories_that_are_links_are_refused(name: str, run: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    shutil.move(run / name, outside)
    before = sorted(outside.rglob("*"))
    os.symlink(outside, run / name)
    with pytest.raises(UserError, match=f"{name}: is a symbolic link; refused"):
        resume(run)
    assert sorted(outside.rglob("*")) == before


def test_a_lock_that_is_a_link_is_refused_and_not_truncated(run: Path, victim: Path) -> None:
    (run / ".lock").unlink()
    os.symlink(victim, run / ".lock")
    with pytest.raises(UserError, match=r"\.lock: it is a symbolic link; refused"):
        resume(run)
    assert victim.read_bytes() == PRECIOUS


def test_a_lock_that_is_a_fifo_is_refused(run: Path) -> None:
    (run / ".lock").unlink()
    os.mkfifo(run / ".lock")
    with pytest.raises(UserError, match="not a regular file"):
        resume(run)


def test_the_lock_is_taken_before_anything_is_loaded(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with writing.lock(run / ".lock") as mine:
        assert mine
        shutil.rmtree(run / "checkpoint")  # would be a separate error
        with pytest.raises(UserError, match="another process is training here"):
            resume(run)


def test_a_run_directory_that_the_user_names_by_a_link(run: Path, tmp_path: Path) -> None:
    os.symlink(run, tmp_path / "link")
    assert resume(tmp_path / "link") == 0
    assert sample.main([str(tmp_path / "link"), "--count", "2", "--out", str(tmp_path / "grid.png")]) == 0


def test_files_below_a_link_are_not_written(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    os.symlink(outside, root / "samples")
    with pytest.raises(UserError, match="samples is a symbolic link; refused"):
        writing.replace_file(root / "samples" / "a.png", b"x", root=root)
    assert not list(outside.iterdir())
    writing.replace_file(root / "deep" / "er" / "a.png", b"x", root=root)
    assert (root / "deep" / "er" / "a.png").read_bytes() == b"x"
