"""The two loaders: one order, the same bytes, exact resume; and errors for damaged data."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.data_cases import latent_shards, prepared

from diffratio_fast.data.native import ReadAhead, Reading, Ring
from diffratio_fast.data.records import Records
from diffratio_fast.data.sampler import Order
from diffratio_fast.data.shards import ShardDataSet
from diffratio_fast.errors import UserError


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepared(tmp_path_factory.mktemp("loaders"))


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A separate data set that the test damages."""
    return prepared(tmp_path)


@pytest.fixture(params=["native", "dali"])
def loader(request: pytest.FixtureRequest) -> str:
    if request.param == "dali":
        pytest.importorskip("nvidia.dali")
    return str(request.param)


def numbered(data: ShardDataSet, split: str) -> dict[bytes, int]:
    """The number of each record by its bytes (random images are all different)."""
    records, _ = data.read(np.arange(*data.manifest.splits[split]))
    return {record.numpy().tobytes(): row for row, record in enumerate(records)}


def numbers(batch: tuple[torch.Tensor, torch.Tensor], index: dict[bytes, int]) -> list[int]:
    return [index[record.numpy().tobytes()] for record in batch[0]]


@settings(max_examples=40, deadline=None)
@given(
    world_size=st.integers(1, 4),
    local=st.integers(1, 13),
    start=st.integers(0, 12),
    block=st.sampled_from([1, 4]),
    seed=st.integers(0, 2**40),
)
def test_any_world_size_and_resume_point_sees_the_same_sequence(
    directory: Path, world_size: int, local: int, start: int, block: int, seed: int
) -> None:
    data = ShardDataSet(directory, block=block, threads=2)
    index, n, batch_size = numbered(data, "train"), data.count("train"), world_size * local
    end = -(-2 * n // batch_size) + start
    alone = [k for b in islice(data.batches("train", batch_size, seed=seed), end) for k in numbers(b, index)]
    for epoch in range(2):  # an epoch visits every record exactly once
        assert sorted(alone[epoch * n : (epoch + 1) * n]) == list(range(n))
    ranks = [
        data.batches("train", batch_size, seed=seed, start=start, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    together = [
        k for step in islice(zip(*ranks, strict=False), end - start) for b in step for k in numbers(b, index)
    ]
    assert together == alone[start * batch_size :]


@pytest.mark.parametrize("world_size", [1, 3])
def test_finite_mode_visits_every_record_once_an_epoch(directory: Path, loader: str, world_size: int) -> None:
    data = ShardDataSet(directory, loader=loader)
    index, n = numbered(data, "train"), data.count("train")
    ranks = [
        list(data.batches("train", 36, seed=3, rank=rank, world_size=world_size, epochs=2))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = [k for step in zip(*ranks, strict=True) for batch in step for k in numbers(batch, index)]
    assert len(seen) == 2 * n
    assert sorted(seen[:n]) == sorted(seen[n:]) == list(range(n))
    assert seen[:n] != seen[n:]


@pytest.mark.parametrize("kind", ["image", "latent_moments"])
def test_dali_gives_the_same_batches_bit_for_bit(directory: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("nvidia.dali")
    where = directory if kind == "image" else latent_shards(tmp_path)
    a, b = (
        ShardDataSet(where, loader=loader).batches("train", 8, seed=5, start=2, rank=1, world_size=2)
        for loader in ("native", "dali")
    )
    for (x, x_labels), (y, y_labels) in islice(zip(a, b, strict=False), 20):
        assert x.dtype == y.dtype == (torch.uint8 if kind == "image" else torch.float16)
        assert x_labels.dtype == y_labels.dtype == torch.int64 and x_labels.shape == (4,)
        assert torch.equal(x, y) and torch.equal(x_labels, y_labels)


def test_a_dali_pipeline_continues_from_its_own_checkpoint(directory: Path) -> None:
    pytest.importorskip("nvidia.dali")
    from diffratio_fast.data.dali import build_pipeline

    data = ShardDataSet(directory)
    records, order = Records(directory, data.manifest), Order(1, 8, data.count("train"))
    sources = [ReadAhead(records, order, 0, Reading()) for _ in range(2)]
    pipeline = build_pipeline(sources[0], records, order, 0, torch.device("cpu"))
    for _ in range(3):
        pipeline.run()
    checkpoint = pipeline.checkpoint()
    expected = [pipeline.run()[0].as_array() for _ in range(3)]
    other = build_pipeline(sources[1], records, order, 0, torch.device("cpu"), checkpoint=checkpoint)
    for array in expected:
        np.testing.assert_array_equal(other.run()[0].as_array(), array)
    for source in sources:
        source.close()


def test_records_and_labels_belong_together(directory: Path) -> None:
    data = ShardDataSet(directory)
    stored, stored_labels = data.read(np.arange(*data.manifest.splits["train"]))
    label_of = {r.numpy().tobytes(): int(y) for r, y in zip(stored, stored_labels, strict=True)}
    assert set(label_of.values()) == {0, 1, 2}
    for records, labels in data.batches("train", 16, seed=0, epochs=1):
        assert [label_of[r.numpy().tobytes()] for r in records] == labels.tolist()


def test_a_kept_batch_never_changes(directory: Path) -> None:
    data = ShardDataSet(directory, ahead=1)
    kept = [x for x, _ in islice(data.batches("train", 16, seed=0), 30)]
    copied = [x.clone() for x, _ in islice(data.batches("train", 16, seed=0), 30)]
    assert all(torch.equal(a, b) for a, b in zip(kept, copied, strict=True))


def test_the_ring_lends_a_buffer_again_once_nobody_holds_it() -> None:
    ring = Ring(64)
    lent = ring.acquire()
    tensor = torch.from_numpy(lent.reshape(8, 8))
    part = tensor[2]
    address = lent.ctypes.data
    del lent, tensor
    assert ring.acquire().ctypes.data != address  # `part` is still a view of it
    del part
    held = [ring.acquire() for _ in range(2)]
    assert address in {array.ctypes.data for array in held}
    assert ring.allocated == 2


def test_a_loop_over_batches_needs_few_buffers(directory: Path) -> None:
    data = ShardDataSet(directory)
    order = Order(0, 8, data.count("train"))
    source = ReadAhead(Records(directory, data.manifest), order, 0, Reading(ahead=3))
    for batch in range(100):
        source.read(batch)
    assert source.ring.allocated <= 3 + 2
    source.close()


def test_first_is_the_stored_order(directory: Path) -> None:
    data = ShardDataSet(directory)
    records, labels = data.first("test", 4)
    begin, end = data.manifest.splits["test"]
    again, _ = data.read(np.arange(begin, begin + 4))
    assert torch.equal(records, again) and records.shape == (4, 3, 8, 8) and labels.dtype == torch.int64
    assert len(data.first("test", 10**6)[0]) == end - begin == data.count("test") == 6


# ------------------------------------------------------------------------------- fault injection


def read_all(directory: Path, **options: object) -> None:
    data = ShardDataSet(directory, **options)  # type: ignore[arg-type]
    for split in ("train", "validation", "test"):
        for _ in data.batches(split, 8, seed=0, epochs=1):
            pass


def edit_manifest(directory: Path, **changes: object) -> None:
    content = json.loads((directory / "manifest.json").read_text())
    (directory / "manifest.json").write_text(json.dumps(content | changes))


def flip_bit(path: Path, position: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        byte = file.read(1)[0]
        file.seek(position)
        file.write(bytes([byte ^ 4]))


def test_an_undamaged_data_set_reads(damaged: Path) -> None:
    read_all(damaged, verify="always")


def test_truncated_shard_is_refused_before_it_is_read(damaged: Path) -> None:
    shard = damaged / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"shard-00001\.bin: truncated \(1339 of 1344 bytes\)"):
        ShardDataSet(damaged)


def test_shard_that_grew_is_refused(damaged: Path) -> None:
    shard = damaged / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes() + b"x")
    with pytest.raises(UserError, match=r"shard-00001\.bin: 1345 bytes; the manifest expects 1344"):
        ShardDataSet(damaged)


def test_shard_truncated_while_open_names_file_and_record(damaged: Path, loader: str) -> None:
    data = ShardDataSet(damaged, loader=loader)
    with (damaged / "shard-00002.bin").open("r+b") as file:
        file.truncate(192 * 3 + 10)
    with pytest.raises(UserError, match=r"shard-00002\.bin: truncated at record [3-6] of this shard"):
        for _ in data.batches("train", 8, seed=0, epochs=1):
            pass


def test_flipped_bit_names_file_and_record(damaged: Path, loader: str) -> None:
    flip_bit(damaged / "shard-00001.bin", 2 * 192 + 7)
    for verify in ("always", "first_epoch"):
        with pytest.raises(
            UserError, match=r"shard-00001\.bin: record 9 \(number 2 of this shard\) is damaged"
        ):
            read_all(damaged, verify=verify, loader=loader)
    read_all(damaged, verify="never", loader=loader)


def test_first_epoch_verifies_each_record_once_after_a_resume(damaged: Path) -> None:
    data = ShardDataSet(damaged, verify="first_epoch", ahead=1)
    n = data.count("train")
    batches = data.batches("train", n, seed=0, start=3)
    for _ in range(2):
        next(batches)
    for shard in range(3):
        flip_bit(damaged / f"shard-{shard:05d}.bin", 11)
    for _ in range(6):
        next(batches)  # no longer referenced
    with pytest.raises(UserError, match="is damaged"):
        next(data.batches("train", n, seed=0, start=3))
    with pytest.raises(UserError, match="is damaged"):
        next(ShardDataSet(damaged, verify="always").batches("train", n, seed=0))


def test_missing_shard(damaged: Path) -> None:
    (damaged / "shard-00003.bin").unlink()
    with pytest.raises(UserError, match=r"shard-00003\.bin: missing"):
        ShardDataSet(damaged)


def test_manifest_of_a_newer_version(damaged: Path) -> None:
    edit_manifest(damaged, version=2)
    with pytest.raises(UserError, match=r"manifest\.json: format version 2.*upgrade"):
        ShardDataSet(damaged)


def test_label_out_of_range_names_the_record(damaged: Path) -> None:
    labels = np.load(damaged / "labels.npy")
    labels[17] = 3
    np.save(damaged / "labels.npy", labels)
    with pytest.raises(UserError, match=r"labels\.npy: record 17 has label 3; expected 0 to 2"):
        ShardDataSet(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"records": 61}, "do not add up"),
        ({"shape": [3, 8, 9]}, "record_bytes"),
        ({"shape": [3, 8]}, "damaged"),
        ({"kind": "video"}, "unknown kind"),
        ({"dtype": "float32"}, "dtype"),
        ({"class_names": []}, "class names"),
        ({"scaling": {"mean": [0], "std": [0], "low": 0, "high": 255}}, "positive std"),
        ({"splits": {"train": [0, 9], "validation": [10, 50], "test": [50, 60]}}, "does not begin where"),
        ({"shards": [{"file": "../x", "records": 60, "size": 60 * 192, "sha256": ""}]}, "plain file name"),
        ({"format": "other"}, "not a manifest"),
        ({"vae": {"name": "x", "sha256": ""}}, "vae must be set"),
    ],
)
def test_contradicting_manifests_are_refused(damaged: Path, change: dict[str, object], message: str) -> None:
    edit_manifest(damaged, **change)
    with pytest.raises(UserError, match=message):
        ShardDataSet(damaged)


def test_broken_or_missing_manifest(damaged: Path) -> None:
    (damaged / "manifest.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        ShardDataSet(damaged)
    (damaged / "manifest.json").unlink()
    with pytest.raises(UserError, match="rerun an interrupted prepare"):
        ShardDataSet(damaged)


def test_index_file_of_another_length(damaged: Path) -> None:
    np.save(damaged / "checksums.npy", np.zeros(5, np.uint64))
    with pytest.raises(UserError, match=r"checksums\.npy: wrong dtype or .* expects uint64 \(60,\)"):
        ShardDataSet(damaged)


def test_latents_scaled_for_another_vae(tmp_path: Path) -> None:
    directory = latent_shards(tmp_path)
    assert ShardDataSet(directory).scaling.mean == (5.81, 3.25, 0.12, -2.15)
    edit_manifest(directory, scaling={"mean": [0.0] * 4, "std": [5.5] * 4, "low": None, "high": None})
    with pytest.raises(UserError, match="does not match their VAE"):
        ShardDataSet(directory)


def test_bad_arguments_are_one_line(directory: Path) -> None:
    bad: list[dict[str, object]] = [{"loader": "x"}, {"verify": "x"}, {"block": 0}, {"threads": 0}]
    for options in bad:
        with pytest.raises(UserError):
            ShardDataSet(directory, **options)  # type: ignore[arg-type]
    data = ShardDataSet(directory)
    with pytest.raises(UserError, match="multiple"):
        data.batches("train", 7, seed=0, world_size=2)
    with pytest.raises(UserError, match="no split"):
        data.batches("holdout", 8, seed=0)
