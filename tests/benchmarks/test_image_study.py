"""The study of methods on images, at a tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.studies import image_study, small_images
from diffratio_fast.data.dataset import InMemoryDataSet
from diffratio_fast.data.scaling import Scaling


@pytest.fixture
def images() -> InMemoryDataSet:
    """Two classes of 16 x 16 images, bright above or below the middle."""
    generator = torch.Generator().manual_seed(0)

    def split(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.arange(count) % 2
        records = torch.randint(0, 80, (count, 1, 16, 16), generator=generator)
        records[labels == 0, :, :8] += 120
        records[labels == 1, :, 8:] += 120
        return records.to(torch.uint8), labels

    splits = {"train": split(200), "validation": split(100), "test": split(100)}
    whole = InMemoryDataSet("bright", ("above", "below"), Scaling((127.5,), (63.75,), 0.0, 255.0), splits)
    return small_images.averaged(whole, {"train": 200, "validation": 100, "test": 100}, 2)


def test_averaged_images_are_means_of_four_pixels_and_scaled(images: InMemoryDataSet) -> None:
    assert images.shape == (1, 8, 8) and images.count("test") == 100
    x0 = images.scaling.to_model(images.splits["train"][0].double())
    assert float(x0.mean()) == pytest.approx(0, abs=1e-9) and float(x0.std()) == pytest.approx(0.5, rel=1e-3)


def test_judge_prefers_real_images_to_others(images: InMemoryDataSet) -> None:
    judge = small_images.Judge(images, small_images.fitted_classifier(images, epochs=20), samples=60)
    real, noise = judge.real(), judge(torch.randn(60, 1, 8, 8, generator=torch.Generator().manual_seed(1)))
    assert real["accuracy"] > 0.95
    assert real["pixels"] < noise["pixels"] / 5 and real["features"] < noise["features"] / 5
    assert real["recall"] > noise["recall"] and real["coverage"] > noise["coverage"]


def test_steps_cost_the_budget() -> None:
    assert image_study.steps_for(60.0, (0.1, 0.2), 50) == 50 + 275
    assert image_study.steps_for(60.0, (0.0, 0.2), 0) == 300


@pytest.mark.slow
def test_study_at_a_tiny_size(
    images: InMemoryDataSet, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(image_study, "step_costs", lambda data, methods, path: dict.fromkeys(methods, (1, 1)))
    monkeypatch.setattr(image_study, "BACKBONE", {
        "backbone": "edm:ddpmpp",
        "backbone_options": json.dumps(
            {"model_channels": 4, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
        ),
    })  # fmt: skip
    rows = list(image_study.study(
        images, list(image_study.METHODS), "weak", seeds=1, seconds=4, share=0.02, pictures=tmp_path
    ))  # fmt: skip
    assert [row["method"] for row in rows] == ["real images", "start", *image_study.METHODS]
    distances = [row["pixels"] for row in rows]
    assert len(set(distances)) == len(rows) and distances[0] == min(distances)
    assert {row["steps"] for row in rows[2:]} <= {4, 5}
    assert len(image_study.table(rows).splitlines()) == 2 + len(rows)
    assert len(list(tmp_path.glob("*.png"))) == len(image_study.METHODS)
