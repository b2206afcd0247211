"""Pre-train, train, sample and evaluate on CIFAR-10 and Fashion-MNIST themselves, at a reduced size.

Tests of a data set are skipped if its environment variable is not set (``DIFFRATIO_CIFAR10``: a file or
folder for ``prepare``; ``DIFFRATIO_FASHION_MNIST``: the folder of its IDX files).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.data_cases import run_prepare

from diffratio_fast import evaluate, networks, ops, pretrain, sample, train
from diffratio_fast.config.options import read_yaml
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.objectives.held_out import LOG_2
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.training.generator_run import Trainer

VARIABLES = {"cifar10-cond": "DIFFRATIO_CIFAR10", "fashion": "DIFFRATIO_FASHION_MNIST"}
SHAPES = {"cifar10-cond": (3, 32, 32), "fashion": (1, 28, 28)}
BACKBONE = {"model_channels": 16, "channel_mult": [1, 1], "num_blocks": 1, "attn_resolutions": []}
STEPS = 36
WARMUP, TRAIN_STEPS = 8, 12
COMMON = ["--device", "cpu", "--threads", "1", "--precision", "float32", "--batch-size", "16",
          "--log-every", "6", "--eval-every", "1000", "--eval-images", "32"]  # fmt: skip
PRETRAIN = ["--steps", str(STEPS), "--lr", "3e-3", "--lr-warmup-steps", "5", "--lr-schedule", "constant",
            "--ema-half-life-images", "100"]  # fmt: skip
TRAIN = ["--steps", str(TRAIN_STEPS), "--ratio-warmup-steps", str(WARMUP), "--generator-ramp-steps", "1",
         "--ratio-lr", "1e-3", "--generator-lr", "2e-4", "--ema-half-life-images", "20",
         "--refit-steps", "2"]  # fmt: skip


@dataclass
class Chain:
    preset: str
    data: Path
    denoiser: Path
    run: Path

    def config(self, **options: Any) -> TrainConfig:
        return TrainConfig(**(read_yaml(TrainConfig, self.run / "config.yaml") | options))


def logged(run: Path, key: str) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in lines if key in line]


@pytest.fixture(scope="module", params=list(VARIABLES))
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """The run directories of a denoiser and of the generator initialized from it."""
    preset = request.param
    source = os.environ.get(VARIABLES[preset])
    if not source:
        pytest.skip(f"{VARIABLES[preset]} names no copy of the data")
    root = tmp_path_factory.mktemp("chain")
    data, denoiser, generator = (root / name for name in ("data", "denoiser", "run"))
    assert run_prepare(source, data, "--validation", "1000") == 0
    common = [preset, *COMMON, "--data", str(data), "--backbone-options", json.dumps(BACKBONE)]
    threads = torch.get_num_threads()
    assert pretrain.main([*common, *PRETRAIN, "--run-dir", str(denoiser)]) == 0
    assert train.main([*common, *TRAIN, "--init", str(denoiser), "--run-dir", str(generator)]) == 0
    torch.set_num_threads(threads)
    return Chain(preset, data, denoiser, generator)


@pytest.mark.slow
def test_the_denoiser_learns(chain: Chain) -> None:
    """1 is the weighted error of a network whose output is zero, and of the initial network."""
    errors = logged(chain.denoiser, "error")
    assert 0.8 < errors[0] < 1.1 and errors[-1] < 0.85 * errors[0]
    (error,) = logged(chain.denoiser, "validation_error")
    assert 0.05 < error < 0.8
    summary = json.loads((chain.denoiser / "summary.json").read_text())
    assert summary["validation_error"] == error and summary["evaluation_images"] == 32


def test_classes_arrive(chain: Chain) -> None:
    dataset = open_dataset(str(chain.data))
    assert dataset.shape == SHAPES[chain.preset] and len(dataset.class_names) == 10
    run = Trainer(chain.preset, chain.config(), RunDirectory(chain.run))
    batches = run.batches()
    labels = torch.cat([next(batches)[0][1] for _ in range(12)])
    assert set(labels.tolist()) == set(range(10))
    denoiser, _ = networks.load_published(chain.denoiser / "denoiser.safetensors")
    assert denoiser.label_dim == 10
    x = torch.randn(10, *SHAPES[chain.preset])
    with torch.no_grad():
        of_classes = denoiser(x[:1].expand_as(x), torch.tensor(2.5), torch.arange(10))
    assert float(torch.pdist(of_classes.flatten(1)).min()) > 1e-3  # no two classes are denoised alike


def test_the_generator_starts_as_the_denoiser_and_moves(chain: Chain, tmp_path: Path) -> None:
    config = chain.config()
    start = Trainer(chain.preset, config, RunDirectory(tmp_path)).state.generator
    denoiser, _ = networks.load_published(chain.denoiser / "denoiser.safetensors")
    rng, index = ops.make_rng(0, 0), torch.arange(10)
    z = latents_for(start, rng, index, ops.Purpose.SAMPLE_LATENT)
    with torch.no_grad():
        wanted = denoiser(config.sigma_init * z, torch.tensor(config.sigma_init), index)
        assert float(wanted.std()) > 0.05
        torch.testing.assert_close(start(z, index), torch.clamp(wanted, start.low, start.high))
        trained, _ = networks.load(chain.run / "generator.safetensors", "generator")
        change = float((trained(z, index) - wanted).square().mean().sqrt())
    assert 1e-3 < change < 0.5  # after four steps: changed, but still close


def test_the_ratio_network_separates_held_out_and_generated_images(chain: Chain) -> None:
    divergences = logged(chain.run, "divergence")
    assert all(map(math.isfinite, divergences))
    assert 0.005 < divergences[-1] < LOG_2
    summary = json.loads((chain.run / "summary.json").read_text())
    assert summary["divergence"] > 0.005 and math.isfinite(summary["divergence_refit"])
    assert summary["steps"] == TRAIN_STEPS and (chain.run / "report.html").exists()
    if chain.preset == "fashion":  # CIFAR-10 has too many pixels for distances between them
        assert summary["evaluation_images"] == 32 and summary["frechet_distance"] > 0


def test_samples_and_their_figures(chain: Chain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    channels, side, _ = SHAPES[chain.preset]
    out = tmp_path / "samples.npz"
    assert sample.main([str(chain.run), "--count", "30", "--out", str(out), "--device", "cpu"]) == 0
    with np.load(out) as archive:
        images, labels = archive["images"], archive["labels"]
    assert images.shape == (30, side, side, channels) and images.dtype == np.uint8
    assert labels.tolist() == [number % 10 for number in range(30)]
    assert images.std() > 10 and len(np.unique(images.reshape(30, -1), axis=0)) == 30
    arguments = [out, "--reference", chain.data, "--features", "pixels", "--metrics", "kernel",
                 "--split", "validation", "--json", "--device", "cpu"]  # fmt: skip
    capsys.readouterr()
    assert evaluate.main([str(argument) for argument in arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["count"] == 30
    floor = found["floors"]["test against validation"]["real"]["kernel_distance"]
    assert found["results"][0]["kernel_distance"] > 2 * abs(floor)  # not yet similar to photographs
