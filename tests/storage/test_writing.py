"""Files are replaced atomically."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from diffratio_fast.errors import UserError
from diffratio_fast.runs.log import MetricsLog
from diffratio_fast.storage import writing
from diffratio_fast.storage.tensors import save_tensors


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "state"
    writing.replace_file(target, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        writing.replace_file(target, "new")
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_the_name_changes_only_after_the_content_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen(name: str, function: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            order.append(name)
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(os, "fsync", seen("fsync", fsync))
    monkeypatch.setattr(os, "replace", seen("replace", replace))
    writing.replace_file(tmp_path / "new" / "state", b"content")
    assert order == ["fsync", "replace", "fsync"]
    assert (tmp_path / "new" / "state").read_bytes() == b"content"


def test_a_log_drops_lines_of_undone_steps_and_cut_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": float("nan") if step == 2 else 1.0})
    log.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "lo')
    MetricsLog(path, 2).close()
    assert path.read_text() == '{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n'


def test_a_temporary_of_a_killed_writer_is_removed_and_one_in_use_is_not(tmp_path: Path) -> None:
    target = tmp_path / "state"
    abandoned = tmp_path / f".state.{'0' * 16}.tmp"
    abandoned.write_text("half")
    (tmp_path / f".other.{'0' * 16}.tmp").write_text("of another file")
    with writing.replacing(target) as file:
        file.write(b"new")
        writing.replace_file(target, "by another writer")
        assert len(list(tmp_path.glob(".state.*.tmp"))) == 1
    assert target.read_bytes() == b"new" and not list(tmp_path.glob(".state.*"))
    writing.remove_abandoned(tmp_path)
    assert list(tmp_path.iterdir()) == [target]


def test_the_same_network_is_the_same_bytes(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, dtype=torch.float16)}
    metadata = {name: name * 3 for name in "zyxwvutsrq"}
    for number, order in enumerate((metadata, dict(reversed(metadata.items())))):
        save_tensors(tmp_path / str(number), tensors, order)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes()
    with safe_open(tmp_path / "0", "pt") as file:
        assert file.metadata() == metadata
        assert all(torch.equal(file.get_tensor(name), tensor) for name, tensor in tensors.items())
