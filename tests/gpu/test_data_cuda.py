"""The loaders on a GPU: the same batches as on the CPU when copies and kernels overlap."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.data_cases import prepared

from diffratio_fast.data import open_dataset
from diffratio_fast.data.shards import ShardDataSet

pytestmark = pytest.mark.requires_cuda


@pytest.mark.parametrize("loader", ["native", "dali"])
def test_batches_on_the_gpu_are_those_of_the_cpu(tmp_path: Path, loader: str) -> None:
    if loader == "dali":
        pytest.importorskip("nvidia.dali")
    directory = prepared(tmp_path)
    expected = list(islice(ShardDataSet(directory).batches("train", 16, seed=0), 60))
    data = ShardDataSet(directory, loader=loader, device="cuda", ahead=1)
    busy = torch.randn(2048, 2048, device="cuda")
    kept = []
    for records, labels in islice(data.batches("train", 16, seed=0), 60):
        assert records.is_cuda and labels.is_cuda
        busy = busy @ busy / 45  # the stream of the consumer lags behind
        kept.append((records + 0, labels + 0))
        del records, labels
    for (a, a_labels), (b, b_labels) in zip(kept, expected, strict=True):
        assert torch.equal(a.cpu(), b) and torch.equal(a_labels.cpu(), b_labels)


def test_a_data_set_in_memory_goes_to_the_gpu_too() -> None:
    expected = list(islice(open_dataset("digits").batches("train", 16, seed=0), 20))
    found = list(islice(open_dataset("digits", device="cuda").batches("train", 16, seed=0), 20))
    for (a, a_labels), (b, b_labels) in zip(found, expected, strict=True):
        assert a.is_cuda and torch.equal(a.cpu(), b) and torch.equal(a_labels.cpu(), b_labels)
