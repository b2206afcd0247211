"""The digits that ship with the package, and the order in which records are read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import SPLITS
from diffratio_fast.data.digits import FILE
from diffratio_fast.data.sampler import batch_records, permutation
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.errors import UserError


def test_file_is_the_published_set_with_a_stratified_split() -> None:
    published = load_digits()
    with np.load(FILE) as archive:
        assert np.array_equal(archive["images"], published.images.astype(np.uint8))
        assert np.array_equal(archive["labels"], published.target)
        split = archive["split"]
    train, test = train_test_split(np.arange(1797), test_size=297, stratify=published.target, random_state=0)
    train, validation = train_test_split(
        train, test_size=150, stratify=published.target[train], random_state=0
    )
    for number, records in enumerate((train, validation, test)):
        assert np.array_equal(np.flatnonzero(split == number), np.sort(records))


def test_dataset_scaling_is_that_of_its_training_split() -> None:
    digits = open_dataset("digits")
    assert [digits.count(split) for split in SPLITS] == [1350, 150, 297]
    assert digits.shape == (1, 8, 8) and len(digits.class_names) == 10
    records, labels = digits.first("train", 10_000)
    x0 = digits.scaling.to_model(records.double())
    assert float(x0.mean()) == pytest.approx(0, abs=1e-12)
    assert float(x0.std(correction=0)) == pytest.approx(0.5)
    assert torch.equal(digits.scaling.to_records(x0).round().to(torch.uint8), records)
    bounds = digits.scaling.bounds()
    assert bounds is not None
    low, high = (torch.tensor(bound)[None] for bound in bounds)
    assert torch.equal(low, digits.scaling.to_model(torch.zeros(1, 1)))
    assert torch.equal(high, digits.scaling.to_model(torch.full((1, 1), 16.0)))
    assert labels.dtype == torch.int64


def test_scaling_is_per_channel() -> None:
    scaling = Scaling((1.0, 2.0), (4.0, 0.5))
    records = torch.tensor([5.0, 3.0]).reshape(1, 2, 1, 1).expand(3, 2, 4, 4)
    x0 = scaling.to_model(records)
    assert x0[0, :, 0, 0].tolist() == [0.5, 1.0]
    torch.testing.assert_close(scaling.to_records(x0), records)
    assert scaling.bounds() is None


def test_unknown_data_set() -> None:
    with pytest.raises(UserError, match="digits"):
        open_dataset("dgits")


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 50),
    world=st.sampled_from([1, 2, 3, 4]),
    local=st.integers(1, 20),
    start=st.integers(0, 7),
    seed=st.integers(0, 2**63 - 1),
)
def test_order_is_the_same_at_any_world_size_and_resume_point(
    n: int, world: int, local: int, start: int, seed: int
) -> None:
    size = world * local
    whole = np.concatenate([batch_records(seed, batch, size, n) for batch in range(start + 3)])
    for epoch in range(len(whole) // n):
        assert sorted(whole[epoch * n : (epoch + 1) * n]) == list(range(n))
    parts = [
        [batch_records(seed, batch, size, n, rank=rank, world_size=world) for rank in range(world)]
        for batch in range(start, start + 3)
    ]
    assert np.array_equal(np.concatenate([np.concatenate(part) for part in parts]), whole[start * size :])


def test_orders_differ_by_epoch_and_seed() -> None:
    orders = [permutation(seed, epoch, 1000) for seed in (0, 1) for epoch in (0, 1)]
    assert len({order.tobytes() for order in orders}) == 4


def test_batches_resume_from_a_batch_number() -> None:
    digits = open_dataset("digits")
    through = digits.batches("train", 100, seed=5)
    seen = [next(through) for _ in range(20)]
    again = digits.batches("train", 100, seed=5, start=13)
    for records, labels in seen[13:]:
        other_records, other_labels = next(again)
        assert torch.equal(records, other_records) and torch.equal(labels, other_labels)
