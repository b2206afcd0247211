"""The study of initialization, at a tiny size: four combinations that differ only in initial weights."""

from __future__ import annotations

import pytest
import torch

from benchmarks.studies import init_study
from diffratio_fast.data.dataset import InMemoryDataSet
from diffratio_fast.data.scaling import Scaling


@pytest.fixture
def images() -> InMemoryDataSet:
    """Two classes of 28 x 28 images, bright above or below the middle."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 2
        records = torch.randint(0, 80, (count, 1, 28, 28), generator=generator)
        records[labels == 0, :, :14] += 120
        records[labels == 1, :, 14:] += 120
        return records.to(torch.uint8), labels

    scaling = Scaling((127.5,), (63.75,), 0.0, 255.0)
    return InMemoryDataSet("bright", ("above", "below"), scaling, {
        "train": split(200), "validation": split(100), "test": split(100)
    })  # fmt: skip


def test_reduced_images_are_means_of_four_pixels(images: InMemoryDataSet) -> None:
    small = init_study.reduced(images)
    assert small.shape == (1, 14, 14) and small.count("validation") == 100
    block = images.splits["train"][0][3, 0, 4:6, 8:10].double().mean()
    assert abs(float(small.splits["train"][0][3, 0, 2, 4]) - float(block)) <= 0.5
    x0 = small.scaling.to_model(small.splits["train"][0].double())
    assert float(x0.mean()) == pytest.approx(0, abs=1e-9) and float(x0.std()) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.slow
def test_study_at_a_tiny_size(images: InMemoryDataSet, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(init_study, "SAMPLES", 40)
    monkeypatch.setattr(init_study, "EVERY", 300)
    rows = list(init_study.study(init_study.reduced(images), seeds=1, share=0.02))
    assert [row["start"] for row in rows] == list(init_study.STARTS)
    first = {row["start"]: row["distance"][0] for row in rows}
    # before the first step the curves depend only on the generator's initial weights
    assert first["both random"] == first["ratio network pre-trained"]
    assert first["generator pre-trained"] == first["both pre-trained"] != first["both random"]
    assert len({row["distance"][-1] for row in rows}) == 4
    lines = init_study.table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and "both pre-trained" in lines[-1]
