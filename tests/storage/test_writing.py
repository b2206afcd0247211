"""Files are replaced whole or not at all."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from diffratio_fast.errors import UserError
from diffratio_fast.runs.log import MetricsLog
from diffratio_fast.storage import writing


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
        def call(*arguments: Any) -> Any:
            order.append(name)
            return function(*arguments)

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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    log.close()
    log._file = open("/dev/full", "w", buffering=1)  # noqa: SIM115
    with pytest.raises(UserError, match="No space left"):
        log.write({"step": 1})
