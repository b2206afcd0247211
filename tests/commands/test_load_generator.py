"""``load_generator``: the same images as the command's, and the log ratio by its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.data_cases import latent_shards
from support.helpers import SMALL

import diffratio_fast
from diffratio_fast import networks, ops, refit, sample, train
from diffratio_fast.data import open_dataset
from diffratio_fast.errors import UserError


@pytest.fixture(scope="module")
def refitted(trained: Path) -> Path:
    assert refit.main([str(trained), "--steps", "4", "--device", "cpu"]) == 0
    return trained


def test_images_are_those_of_the_command(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.npz"
    options = [str(trained), "--count", "7", "--seed", "5", "--classes", "3,8", "--out", str(out)]
    assert sample.main([*options, "--device", "cpu"]) == 0
    with np.load(out) as archive:
        expected, labels = archive["images"], archive["labels"]
    snapshot = next(
        iter(sorted((trained / "snapshots").glob("*.safetensors"))), trained / "generator.safetensors"
    )
    for path in (trained, trained / "generator.safetensors", str(trained)):
        generator = diffratio_fast.load_generator(path, device="cpu")
        found = generator.sample(7, [3, "8"], seed=5)
        assert found.dtype == np.uint8 and found.shape == (7, 8, 8, 1) and np.array_equal(found, expected)
        assert np.array_equal(generator.labels([3, 8], 7).numpy(), labels)
        later = generator.sample(3, [3, 8], seed=5, start=4)
        assert np.array_equal(later, expected[4:])
    assert diffratio_fast.load_generator(snapshot, device="cpu").sample(2).shape == (2, 8, 8, 1)


def test_classes_by_number_name_or_none(trained: Path) -> None:
    generator = diffratio_fast.load_generator(trained, device="cpu")
    assert generator.labels(None, 12).tolist() == [*range(10), 0, 1]
    assert generator.labels("7", 3).tolist() == [7, 7, 7] == generator.labels(7, 3).tolist()
    assert generator.labels(torch.tensor([1, 2]), 3).tolist() == [1, 2, 1]
    assert "x0 1 x 8 x 8, 10 classes" in repr(generator)


def test_x0_is_scaled_to_the_data(trained: Path) -> None:
    generator = diffratio_fast.load_generator(trained, device="cpu")
    x0 = generator.sample(300, seed=1, output="x0")
    assert x0.shape == (300, 1, 8, 8) and x0.dtype == torch.float32
    network, _ = networks.load(trained / "generator.safetensors", "generator")
    assert torch.equal(x0, networks.generate(network, generator.labels(None, 300), 1).float())


def test_log_ratio_is_the_mean_over_draws(trained: Path) -> None:
    generator = diffratio_fast.load_generator(trained, device="cpu")
    data = open_dataset("digits")
    records, labels = data.first("test", 6)
    x0 = data.scaling.to_model(records)
    found = generator.log_ratio(x0, 0.3, labels, seed=2, draws=3)
    ratio, _ = networks.load(trained / "ratio.safetensors", "ratio")
    rng, index, level = ops.make_rng(2, 0, "cpu"), torch.arange(6), torch.full((6,), 0.3)
    with torch.no_grad():
        expected = sum(
            ratio(ops.add_noise(x0, level, rng, index, ops.Purpose.VERIFIER_NOISE, draw=d), level, labels)
            for d in range(3)
        )
    torch.testing.assert_close(found, expected / 3)
    pixels = (records.float() / 16 * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    near = generator.log_ratio(pixels, 0.3, labels, seed=2, draws=3)
    torch.testing.assert_close(near, found, rtol=0.05, atol=0.05)  # 17 gray levels on 256


@pytest.mark.slow
def test_candidates_go_through_the_verifier(refitted: Path, tmp_path: Path) -> None:
    generator = diffratio_fast.load_generator(refitted, device="cpu")
    out = tmp_path / "x.npz"
    options = [str(refitted), "--count", "5", "--candidates", "4", "--sigma", "0.2", "--out", str(out)]
    assert sample.main([*options, "--device", "cpu"]) == 0
    found = generator.sample(5, candidates=4, sigma=0.2)
    with np.load(out) as archive:
        assert np.array_equal(found, archive["images"])
    assert not np.array_equal(found, generator.sample(5))


def test_bad_input_is_one_line(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such run directory"):
        diffratio_fast.load_generator(tmp_path / "nothing")
    generator = diffratio_fast.load_generator(trained, device="cpu")
    for call, expected in [
        (lambda: generator.sample(0), "count must be at least 1"),
        (lambda: generator.sample(1, "eleven"), "no class 'eleven'"),
        (lambda: generator.sample(1, 10), "no class 10"),
        (lambda: generator.sample(1, []), "at least one class"),
        (lambda: generator.sample(1, output="png"), "output must be uint8 or x0"),
        (lambda: generator.sample(1, candidates=3, select="worst"), "select resample or best"),
        (lambda: generator.log_ratio(np.zeros((1, 9, 9, 1), np.uint8), 0.3), "x0 is [N, 1, 8, 8]"),
        (lambda: generator.log_ratio(np.zeros((8, 8), np.uint8), 0.3), "must be uint8 [N, H, W, C]"),
        (lambda: generator.log_ratio(np.zeros((1, 8, 8, 1), np.uint8), 0), "sigma must be positive"),
    ]:
        with pytest.raises(UserError) as error:
            call()
        assert expected in str(error.value) and "\n" not in str(error.value)


def test_latents_come_as_x0_without_a_vae(tmp_path: Path) -> None:
    data = latent_shards(tmp_path, "--validation", "8", "--test", "8")
    options = ["--steps", "2", "--data", str(data), "--eval-images", "16", "--run-dir", str(tmp_path / "run")]
    assert train.main([*SMALL, *options]) == 0
    generator = diffratio_fast.load_generator(tmp_path / "run", device="cpu")
    x0 = generator.sample(3, output="x0")
    assert x0.shape == (3, 4, 4, 4)
    assert generator.log_ratio(x0, 0.5).shape == (3,)
    with pytest.raises(UserError, match="name the VAE that decodes them"):
        generator.sample(3)
    with pytest.raises(UserError, match="give x0, not uint8"):
        generator.log_ratio(np.zeros((1, 4, 4, 4), np.uint8), 0.5)
