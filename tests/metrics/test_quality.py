"""Quality of a run's images at any size: feature spaces, their cache, the classifier."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_cases import image_folder, latent_shards, run_prepare
from support.helpers import SMALL

from diffratio_fast import train
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet, InMemoryDataSet, OneClass
from diffratio_fast.data.scaling import EDM_PIXELS
from diffratio_fast.errors import UserError
from diffratio_fast.metrics import spaces
from diffratio_fast.metrics.feature_cache import FOLDER
from diffratio_fast.metrics.feature_classifiers import LogisticRegression
from diffratio_fast.metrics.features import EXTRACTORS
from diffratio_fast.metrics.features.random import RandomFeatures
from diffratio_fast.metrics.quality import Quality, run_quality
from diffratio_fast.metrics.spaces import choose_space

CPU = torch.device("cpu")


def striped(count: int, seed: int, size: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Records uint8 [count, 3, size, size] of two classes: stripes along rows, or along columns."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    phase, period = random.uniform(0, 6, count), random.uniform(0.8, 1.6, count)
    wave = np.sin(np.arange(size)[None] * period[:, None] + phase[:, None])
    rows, columns = np.repeat(wave[:, :, None], size, 2), np.repeat(wave[:, None], size, 1)
    images = np.where(labels[:, None, None] == 0, rows, columns)[:, None].repeat(3, 1)
    noisy = 127.5 + 80 * images + random.normal(0, 8, images.shape)
    return torch.from_numpy(noisy.clip(0, 255).astype(np.uint8)), torch.from_numpy(labels)


def stripes() -> InMemoryDataSet:
    splits = {name: striped(120, seed) for seed, name in enumerate(("train", "validation", "test"))}
    return InMemoryDataSet("stripes", ("rows", "columns"), EDM_PIXELS, splits)


def x0_of(records: torch.Tensor) -> torch.Tensor:
    return EDM_PIXELS.to_model(records)


def random_quality(dataset: DataSet) -> Quality:
    space = choose_space("random", dataset, CPU)
    assert space is not None
    return Quality(dataset, space, 1000)


def test_random_features_are_the_same_everywhere() -> None:
    """Their weights follow the noise contract: a change would make earlier runs incomparable."""
    network = RandomFeatures(3)
    assert network.dimension == 2 * 2 * (64 + 128) + 3 * 16
    image = torch.linspace(-1, 1, 3 * 8 * 8).reshape(1, 3, 8, 8)
    features = network(image)
    assert features.shape == (1, network.dimension) and torch.isfinite(features).all()
    assert torch.equal(features[0, :48].reshape(3, 4, 4), torch.nn.functional.avg_pool2d(image, 2)[0])
    torch.manual_seed(5)
    assert torch.equal(RandomFeatures(3)(image), features)
    for size in (1, 2, 3, 5):  # small and odd sizes are supported
        assert torch.isfinite(network(torch.zeros(2, 3, size, size))).all()


def test_distances_on_random_features_grow_with_damage() -> None:
    data = stripes()
    quality = random_quality(data)
    fresh, _ = striped(120, 9)
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(0))

    def distance(records: torch.Tensor) -> float:
        return quality.distance(x0_of(records), "validation")

    def noised(amount: float) -> torch.Tensor:
        return (fresh + amount * noise).clamp(0, 255).to(torch.uint8)

    good = distance(fresh)
    assert good < distance(noised(10)) < distance(noised(40))
    blurred = torch.nn.functional.avg_pool2d(fresh.float(), 3, 1, 1).to(torch.uint8)
    assert distance(blurred) > 2 * good
    one_class = fresh[::2].repeat(2, 1, 1, 1)  # a lost class
    assert distance(one_class) > 2 * good
    assert distance(data.splits["validation"][0]) == pytest.approx(0, abs=1e-5)


@pytest.mark.slow
def test_the_summary_of_real_images(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stripes()
    test, labels = data.splits["test"]
    summary = random_quality(data).summary(x0_of(test), labels)
    assert summary["frechet_distance"] == pytest.approx(0, abs=1e-5)
    assert summary["class_accuracy"] == summary["class_accuracy_test"] > 0.95
    wrong = random_quality(data).summary(x0_of(test), 1 - labels)
    assert wrong["class_accuracy"] == pytest.approx(1 - summary["class_accuracy"])
    copies, copied = data.splits["train"]
    memorized = random_quality(data).summary(x0_of(copies), copied)
    assert memorized["nearest_train_distance"] == pytest.approx(0, abs=1e-3)
    assert memorized["nearest_train_distance"] < summary["nearest_train_distance"] / 10
    assert summary["evaluation_features"] == "random" and summary["evaluation_images"] == 120


def test_nearest_training_images() -> None:
    data = stripes()
    chosen = torch.tensor([7, 3, 50])
    nearest = random_quality(data).nearest(x0_of(data.splits["train"][0][chosen]), 4)
    assert nearest.shape == (3, 4) and torch.equal(nearest[:, 0], chosen)


def test_logistic_regression_reaches_the_minimum() -> None:
    """At the minimum the gradient of its loss is zero, by another formula than the fit's."""
    random = np.random.default_rng(0)
    features = random.normal(size=(300, 4)) * [1, 5, 0.1, 2] + 3
    labels = np.argmax(features @ random.normal(size=(4, 3)) + random.normal(size=(300, 3)), 1)
    fitted = LogisticRegression.fit(features, labels, 3)
    x = (features - features.mean(0)) / features.std(0)
    logits = x @ fitted.weight + fitted.bias
    probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (probability - np.eye(3)[labels]) / len(x)
    assert np.abs(x.T @ error + 2e-3 * fitted.weight).max() < 1e-4 and np.abs(error.sum(0)).max() < 1e-4
    assert np.array_equal(fitted.predict(features), logits.argmax(1))


# ------------------------------------------------------------------------------------- which space


def latents() -> InMemoryDataSet:
    moments = torch.cat([torch.randn(40, 4, 8, 8), torch.full((40, 4, 8, 8), 0.1)], 1).half()
    labels = torch.zeros(40, dtype=torch.int64)
    from diffratio_fast.data.scaling import LATENT_SCALINGS, SD_VAE, Vae

    splits = dict.fromkeys(("train", "validation", "test"), (moments, labels))
    return InMemoryDataSet(
        "latents", ("all",), LATENT_SCALINGS[SD_VAE], splits, "latent_moments", Vae(SD_VAE)
    )


def test_auto_takes_the_best_that_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    digits = open_dataset("digits")
    space = choose_space("auto", digits, CPU)
    assert space is not None and space.name == "pixels"
    monkeypatch.setattr(spaces.importlib.util, "find_spec", lambda name: None)
    space = choose_space("auto", stripes(), CPU)
    assert space is not None and space.name == "random"
    asked: list[str] = []

    def load(name: str, *_: object) -> object:
        asked.append(name)
        return EXTRACTORS["random"](None, (3, 24, 24))

    monkeypatch.setattr(spaces, "load_extractor", load)
    monkeypatch.setattr(spaces.importlib.util, "find_spec", lambda name: name)
    choose_space("auto", stripes(), CPU)
    assert asked == ["efficientnet-lite0"]
    assert choose_space("none", digits, CPU) is None


def test_the_options_name_every_space() -> None:
    import dataclasses

    (field,) = (f for f in dataclasses.fields(TrainConfig) if f.name == "eval_features")
    assert set(field.metadata["choices"]) == set(spaces.NAMES)


def test_latents_are_measured_as_they_are_or_refused() -> None:
    data = latents()
    quality = run_quality(TrainConfig(), data, CPU, 40)
    assert quality is not None and quality.space.name == "random features of latents"
    real = quality.x0(data.splits["validation"][0])
    assert quality.distance(real, "validation") == pytest.approx(0, abs=1e-5)
    assert quality.distance(real * 1.5, "validation") > 0.01
    with pytest.raises(UserError, match="name the VAE that decodes them with --vae"):
        choose_space("efficientnet-lite0", data, CPU)
    with pytest.raises(UserError, match="the data are images, not latents; omit --vae"):
        choose_space("auto", stripes(), CPU, Path("vae"))


# ------------------------------------------------------------------------------------------- cache


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shards")
    assert run_prepare(image_folder(root / "images", classes=2, per_class=60, size=20), root / "d") == 0
    return root / "d"


def test_features_and_classifier_are_kept_with_the_data(shards: Path) -> None:
    first = random_quality(open_dataset(str(shards)))
    features, labels = first.train
    summary = first.summary(first.x0(first.dataset.first("test", 20)[0]), first.split("test")[1])
    kept = sorted(path.name.split("-")[0] for path in (shards / FOLDER).iterdir())
    assert kept == ["classifier", "test", "train"]

    again = random_quality(open_dataset(str(shards)))
    again._read = lambda *_: pytest.fail("the features were computed again")  # type: ignore[method-assign]
    assert np.array_equal(again.train[0], features) and torch.equal(again.train[1], labels)
    real = again.x0(again.dataset.first("test", 20)[0])
    assert again.summary(real, again.split("test")[1]) == summary
    without = random_quality(OneClass(open_dataset(str(shards))))
    without._read = again._read  # type: ignore[method-assign]
    assert not without.train[1].any() and labels.any()


@pytest.mark.parametrize("damage", ["cut", "nan", "other"])
def test_a_damaged_cache_is_computed_again(shards: Path, damage: str) -> None:
    quality = random_quality(open_dataset(str(shards)))
    features = quality.train[0]
    (file,) = (shards / FOLDER).glob("train-*.npz")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:200])
    else:
        with np.load(file) as archive:
            about = archive["about"] if damage == "nan" else np.array("{}")
            bad = archive["features"] * (np.nan if damage == "nan" else 1)
        np.savez(file, about=about, features=bad)
    assert np.array_equal(random_quality(open_dataset(str(shards))).train[0], features)


def test_other_features_or_data_are_another_file(shards: Path, tmp_path: Path) -> None:
    data = open_dataset(str(shards))
    _ = random_quality(data).train
    before = len(list((shards / FOLDER).glob("train-*")))
    space = choose_space("random", data, CPU)
    assert space is not None
    _ = Quality(data, space, 50).train
    assert len(list((shards / FOLDER).glob("train-*"))) == before + 1


# -------------------------------------------------------------------------------------------- runs

RUN = [
    *SMALL, "--steps", "8", "--eval-every", "4", "--eval-images", "32", "--generator", "mlp",
    "--eval-features", "random",
]  # fmt: skip


def test_a_run_above_1024_numbers_is_not_blind(shards: Path, tmp_path: Path) -> None:
    assert train.main([*RUN, "--data", str(shards), "--run-dir", str(tmp_path / "run")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    measured = [line for line in lines if "frechet_distance_validation" in line]
    assert [line["step"] for line in measured] == [4, 8]
    assert all(line["evaluation_features"] == "random" for line in measured)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation_features"] == "random" and summary["evaluation_images"] == 32
    assert {"frechet_distance", "class_accuracy", "nearest_train_distance_test"} <= summary.keys()
    lowest = min(line["frechet_distance_validation"] for line in measured)
    assert summary["best"]["frechet_distance_validation"] == pytest.approx(lowest)
    assert (tmp_path / "run" / "snapshots" / "best.safetensors").exists()
    assert (tmp_path / "run" / "neighbours.png").exists()


def test_a_run_on_latents(tmp_path: Path) -> None:
    data = latent_shards(tmp_path, "--validation", "8", "--test", "8")
    assert train.main([*RUN, "--data", str(data), "--run-dir", str(tmp_path / "run")]) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["evaluation_features"] == "random features of latents"
    assert (tmp_path / "run" / "neighbours.png").exists()


def test_no_features_leave_the_distance_out(shards: Path, tmp_path: Path) -> None:
    options = [*RUN, "--eval-features", "none", "--data", str(shards), "--run-dir", str(tmp_path / "run")]
    assert train.main(options) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert "frechet_distance" not in summary and summary["best"] == {}
