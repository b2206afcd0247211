"""Checkpoints alone: the time of the copy, two at once, and untrusted files."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from diffratio_fast.config.train import TrainConfig
from diffratio_fast.errors import UserError
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.storage import checkpoints
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.processes.world import ALONE
from diffratio_fast.training.state import checkpoint
from diffratio_fast.training.state.checkpoint import Checkpoints
from diffratio_fast.training.state.sharded import read_parts

SMALL: dict[str, Any] = {
    "device": "cpu", "batch_size": 8, "generator_width": 8, "ratio_width": 8, "latent_size": 4
}  # fmt: skip


def trainer(path: Path, steps: int = 0) -> Trainer:
    run = Trainer("digits", TrainConfig(**SMALL), RunDirectory(path))
    batches = run.batches()
    for _ in range(steps):
        run.advance(next(batches))
    return run


def saved(run: Trainer) -> Path:
    run.checkpoints.save(run.state)
    assert run.checkpoints.failure() is None
    return run.directory.checkpoint / run.checkpoints.good[-1]


def copies(run: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in run.state.tensors()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, 2)
    go = threading.Event()
    write = checkpoint._write_complete
    monkeypatch.setattr(checkpoint, "_write_complete", lambda *a: (go.wait(60), write(*a)))
    before = copies(run)
    run.checkpoints.save(run.state)  # has started, and waits
    batches = run.batches()
    run.advance(next(batches))
    assert not same(before, copies(run))
    go.set()
    assert run.checkpoints.failure() is None
    again = trainer(tmp_path)
    again.checkpoints.load(again.state)
    assert again.state.step == 2 and same(before, copies(again))


def test_two_are_kept_and_leftovers_removed(tmp_path: Path) -> None:
    run = trainer(tmp_path, 1)
    root = run.directory.checkpoint
    (root / "step-00000009.tmp").mkdir(parents=True)
    (root / "mine").mkdir()
    batches = run.batches()
    for _ in range(3):
        saved(run)
        saved(run)  # the same step again: it exists
        run.advance(next(batches))
    assert sorted(path.name for path in root.iterdir()) == ["mine", "step-00000002", "step-00000003"]


def test_what_was_written_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(tmp_path, 1)
    write = checkpoint._write_file

    def faulty(path: Path, content: bytes) -> None:
        write(path, content[:-1] + bytes([content[-1] ^ 1]) if path.suffix == ".safetensors" else content)

    monkeypatch.setattr(checkpoint, "_write_file", faulty)
    run.checkpoints.save(run.state)
    assert "digest" in str(run.checkpoints.failure())
    assert run.checkpoints.failure() is None and not list(run.directory.checkpoint.iterdir())


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def sign(path: Path, **changes: Any) -> None:
    """Make the index of a checkpoint match the files that exist."""
    index = json.loads((path / "index.json").read_text())
    del index["digest"]
    index["files"] = {file.name: checkpoint._about(file.read_bytes()) for file in path.glob("*.safetensors")}
    index |= changes
    digest = checkpoints.digest_of_index(index)
    (path / "index.json").write_text(json.dumps(index | {"digest": digest}))


def hostile(tensors: dict[str, torch.Tensor], info: str) -> bytes:
    return safetensors.torch.save(tensors, {"DCP_SHARDING_INFO": info})


DEEP = "[" * 100_000
OFFSETS = json.dumps({"sums": {"saved_offsets": [10**15]}})
SHARDS: dict[str, Callable[[Path], list[bytes]]] = {
    "pickle": lambda marker: [pickle.dumps(Payload(marker))],
    "pickles": lambda marker: [pickle.dumps(Payload(marker))] * 2,
    "other tensors": lambda marker: [safetensors.torch.save({"w": torch.zeros(3)})],
    "deep": lambda marker: [hostile({"sums": torch.zeros(7)}, DEEP)] * 2,
    "no offsets": lambda marker: [hostile({"sums": torch.zeros(7)}, "{}")] * 2,
    "far offsets": lambda marker: [hostile({"sums": torch.zeros(7)}, OFFSETS)] * 2,
    "vast optimizer": lambda marker: [
        hostile({"ratio_optimizer.0.step": torch.zeros(7)}, OFFSETS.replace("sums", "ratio_optimizer.0.step"))
    ] * 2,
}  # fmt: skip


@pytest.mark.parametrize("case", SHARDS)
def test_hostile_shards_run_nothing(case: str, tmp_path: Path) -> None:
    path, marker = saved(trainer(tmp_path, 1)), tmp_path / "marker"
    for file in path.glob("*.safetensors"):
        file.unlink()
    for number, content in enumerate(SHARDS[case](marker)):
        (path / f"shard-{number}.safetensors").write_bytes(content)
    sign(path)
    other = trainer(tmp_path)
    with pytest.raises(UserError, match="does not match this run"):
        other.checkpoints.load(other.state)
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [DEEP, "{}", "[]", "\x00", '{"format": "diffratio_fast.checkpoint.2", "files": 3, "digest": ""}'],
    ids=["deep", "empty", "list", "binary", "files"],
)
def test_hostile_indices(text: str, tmp_path: Path) -> None:
    path = saved(trainer(tmp_path, 1))
    (path / "index.json").write_text(text)
    other = trainer(tmp_path)
    with pytest.raises(UserError, match="the checkpoint is damaged"):
        other.checkpoints.load(other.state)


def test_an_index_names_files_of_its_own_directory_only(tmp_path: Path) -> None:
    path = saved(trainer(tmp_path, 1))
    sign(path, files={"../../elsewhere.safetensors": {"bytes": 0, "xxh3_128": ""}})
    with pytest.raises(checkpoints.Damaged, match="other files"):
        checkpoints.read_index(path)


def test_whole_and_part_readers_agree(tmp_path: Path) -> None:
    run = trainer(tmp_path, 3)
    path = saved(run)
    other = trainer(tmp_path)
    assert same(copies(run), read_parts(path, other.state))
    Checkpoints(run.directory.checkpoint, ALONE).load(other.state)
    assert same(copies(run), copies(other))


def test_a_format_with_a_flipped_bit_is_damage(tmp_path: Path) -> None:
    """Then an older checkpoint is used; only an intact index of another format counts as another version."""
    path = tmp_path / "step-00000001"
    path.mkdir()
    index = {"format": checkpoints.FORMAT, "step": 1, "seconds": 0.0, "best": {}, "files": {}}
    intact = index | {"digest": checkpoints.digest_of_index(index)}
    (path / "index.json").write_text(json.dumps(intact | {"format": "diffratio_fast.checkpoint.3"}))
    with pytest.raises(checkpoints.Damaged, match="the digest of index"):
        checkpoints.read_index(path)
    index["format"] = "diffratio_fast.checkpoint.3"
    newer = index | {"digest": checkpoints.digest_of_index(index)}
    (path / "index.json").write_text(json.dumps(newer))
    with pytest.raises(UserError, match="not a checkpoint of this version"):
        checkpoints.read_index(path)
