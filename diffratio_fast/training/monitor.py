"""Measurements of a run: divergence on held-out data, metrics of generated images, sample grids."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from diffratio_fast import networks, ops
from diffratio_fast.config.noise_laws import NoiseLaw
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.pictures import grid, png, viewable
from diffratio_fast.data.scaling import SIGMA_DATA
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.metrics.quality import Quality, run_quality
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.objectives.augmentation import flip
from diffratio_fast.objectives.bin_means import bins
from diffratio_fast.objectives.diffratio import score_difference
from diffratio_fast.objectives.held_out import in_chunks, log_ratios, noise_levels, pair_bounds
from diffratio_fast.objectives.refit import (
    HELD_OUT_PAIRS,
    LEVELS,
    UNLEARNING,
    RefitOptions,
    Refitted,
    refit,
)
from diffratio_fast.progress import format_metric
from diffratio_fast.training.step.generator import Iteration
from diffratio_fast.verifier.calibration import calibrate

SAMPLES = 10_000
"""Default number of images for a Fréchet distance."""
FEW_SAMPLES, SAMPLES_SHARE = 1_000, 1 / 8
"""Images of a short run on a CPU: the minimum, or this fraction of its training images."""
HELD_OUT = 512
"""Maximum held-out images for a divergence estimate; fewer images are noised several times."""
CALIBRATION_SAMPLES = 1024
EVALUATION_SEED = 20_240_217
"""Seed of the measured images, the same in every run, so that metrics are comparable."""
GRID_SEED = 1
GRID_COLUMNS = 12
GRID_ROWS = 10
NEIGHBORS = 5
HISTOGRAM_BINS = 40
TIMED_IMAGES, TIMED_REFIT_STEPS = 256, 8
"""What a plan times of an evaluation."""


def evaluation_images(config: RunConfig, device: torch.device) -> int:
    """Number of images of an evaluation: ``config.eval_images``, or a default for the length of the run.

    On a CPU, ``SAMPLES`` images of a U-Net would take longer than a short training.
    """
    if config.eval_images is not None:
        return config.eval_images
    if device.type != "cpu":
        return SAMPLES
    return min(SAMPLES, max(FEW_SAMPLES, int(SAMPLES_SHARE * config.steps * config.batch_size)))


@dataclass(frozen=True)
class Bound:
    """Lower bound on the Jensen-Shannon divergence in nats, with its standard error over images.

    ``by_level`` is the bound and ``accuracy`` the ratio network's at each of ``noise_levels(law, LEVELS)``.
    """

    value: float
    error: float
    by_level: list[float]
    accuracy: list[float]


@dataclass
class Evaluation:
    """Measurements of a run's state; none of them changes it."""

    config: TrainConfig
    dataset: DataSet
    iteration: Iteration

    @cached_property
    def images(self) -> int:
        """Number of generated images for metrics that need many."""
        return evaluation_images(self.config, self.iteration.device)

    @cached_property
    def quality(self) -> Quality | None:
        """Measures generated images in the space of ``--eval-features``; None for "none"."""
        return run_quality(self.config, self.dataset, self.iteration.device, self.images)

    @cached_property
    def _held_out(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            split: self.iteration.to_device(self.dataset.first(split, min(HELD_OUT, self.images)))
            for split in ("train", "validation")
        }

    def _levels(self, law: NoiseLaw) -> Tensor:
        return noise_levels(law, LEVELS).to(self.iteration.device)

    def _measure_levels(self) -> None:
        """The part of an evaluation that goes through all noise levels, without the refit."""
        for split in ("validation", "train"):
            self.bound(split, every_level=True)

    def seconds(self) -> float:
        """Seconds that an evaluation takes at most: parts of it are timed, and scaled to all of it."""
        config = self.config
        began = time.perf_counter()
        self.grid_png()
        self._measure_levels()
        total = time.perf_counter() - began
        if self.quality is not None:
            began = time.perf_counter()
            labels = torch.zeros(TIMED_IMAGES, dtype=torch.int64)
            self.quality.space(networks.generate(self.iteration.state.average, labels, EVALUATION_SEED))
            total += (time.perf_counter() - began) * self.images / TIMED_IMAGES
        if config.refit_steps:
            began = time.perf_counter()
            self.refitted(TIMED_REFIT_STEPS)
            total += (time.perf_counter() - began) * max(1.0, config.refit_steps / TIMED_REFIT_STEPS)
        return total

    def noise_levels(self) -> dict[str, list[float]]:
        """The levels that lists by noise level are over, of both networks' laws."""
        laws = {"sigma": self.iteration.ratio_law, "generator_sigma": self.iteration.generator_law}
        return {name: self._levels(law).tolist() for name, law in laws.items()}

    def _passes(self, index: Tensor) -> tuple[Tensor, ...]:
        """Split indices into parts of the size of a step's forward pass."""
        return index.split(self.config.micro_batch or len(index))

    def running(self, mean: dict[str, float]) -> dict[str, Any]:
        """The fields of a log line about the online network, from the means since the last one."""
        validation, train = self.bound("validation"), self.bound("train")
        return {
            "ratio_loss": mean["ratio_loss"],
            "ratio_accuracy": (mean["correct_real"] + mean["correct_fake"]) / 2,
            "log_ratio_real": mean["log_ratio_real"],
            "log_ratio_fake": mean["log_ratio_fake"],
            "divergence": validation.value,
            "divergence_train": train.value,
            "divergence_by_sigma": validation.by_level,
            "divergence_train_by_sigma": train.by_level,
            "clamped_fraction": mean["clamped"],
        }

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        """Metrics of a log line for the progress bar, by short name."""
        return {
            "JS": f"{format_metric(values['divergence'])} "
            f"(train {format_metric(values['divergence_train'])})",
            "acc": format_metric(values["ratio_accuracy"]),
        }

    def _random(self, count: int) -> tuple[Tensor, Tensor]:
        device = self.iteration.device
        rng = ops.make_rng(self.config.seed, self.iteration.state.step, device)
        return rng, torch.arange(count, device=device)

    @torch.no_grad()
    def bound(self, split: str, *, every_level: bool = False) -> Bound:
        """The bound of reals of a split and fresh fakes under the online networks, dropout off.

        Each fake has the label and noise level of its real partner. The mean is over the ratio network's
        noise law: its levels are distributed over the images, or all levels are used for each with
        ``every_level``.
        """
        iteration, state = self.iteration, self.iteration.state
        real, labels = self._held_out[split]
        if not len(labels):
            return Bound(math.nan, math.nan, [math.nan] * LEVELS, [math.nan] * LEVELS)
        rng, index = self._random(len(labels))
        state.ratio.eval()
        state.generator.eval()
        latents = latents_for(state.generator, rng, index, ops.Purpose.SAMPLE_LATENT)
        fake = in_chunks(iteration.generator, latents, labels)
        wanted = min(HELD_OUT, self.images)
        draws = LEVELS if every_level else min(LEVELS, math.ceil(wanted / len(labels)))
        first = index[:, None] if draws < LEVELS else torch.zeros_like(index)[:, None]
        level = (first + torch.arange(draws, device=index.device) * LEVELS // draws) % LEVELS
        sigma = self._levels(iteration.ratio_law)[level]
        halves = log_ratios(
            iteration.ratio, real, fake, sigma, labels, rng, index,
            shared_noise=self.config.ratio_shared_noise,
        )  # fmt: skip
        pairs = pair_bounds(*halves).double()
        correct = ((halves[0] > 0).double() + (halves[1] < 0).double()) / 2
        hot = torch.nn.functional.one_hot(level.flatten(), LEVELS).double()
        seen = hot.sum(0)  # a level without images gives nan and is excluded from the mean
        by_level, accuracy = (values.flatten() @ hot / seen for values in (pairs, correct))
        error = pairs.mean(1).std() / math.sqrt(len(labels))
        return Bound(float(by_level.nanmean()), float(error), by_level.tolist(), accuracy.tolist())

    @torch.no_grad()
    def _generator_gradient(self) -> dict[str, list[float]]:
        """Norms of grad l at fakes, and the fractions of the generator's gradient, over its noise law.

        The fraction of a level is the mean of w(sigma) h(l) |grad l| over images, divided by the sum.
        """
        iteration, state = self.iteration, self.iteration.state
        _, labels = self._held_out["validation"]
        rng, index = self._random(len(labels))
        levels = self._levels(iteration.generator_law)
        state.ratio.eval()
        latents = latents_for(state.generator, rng, index, ops.Purpose.SAMPLE_LATENT)
        fake = in_chunks(iteration.generator, latents, labels)
        middles = (torch.arange(LEVELS, device=index.device, dtype=torch.float64) + 0.5) / LEVELS
        h_means = state.h_means[bins(middles)] if self.config.normalize_h else torch.ones_like(middles)
        norms, sizes = [], []
        for level, h_mean in zip(levels, h_means, strict=True):
            sigma = level.to(fake.dtype).expand(len(labels), 1)
            outcomes = [
                score_difference(
                    iteration.ratio, fake[part], sigma[part], labels[part], rng, part,
                    weight=torch.ones_like(sigma[part]), divergence=DIVERGENCES["reverse_kl"],
                )
                for part in self._passes(index)
            ]  # fmt: skip
            slope = torch.cat([outcome.gradient.flatten(1).norm(dim=1) for outcome in outcomes]).double()
            h, _ = iteration.divergence.factor(torch.cat([outcome.log_ratio[:, 0] for outcome in outcomes]))
            weight = iteration.weight(level, SIGMA_DATA)
            norms.append(float(slope.mean()))
            sizes.append(float((weight * h / h_mean * slope).mean()))
        total = sum(sizes) or 1.0
        return {
            "generator_sigma": levels.tolist(),
            "log_ratio_gradient_by_sigma": norms,
            "generator_gradient_share": [size / total for size in sizes],
        }

    def refitted(self, steps: int) -> Refitted | None:
        """A copy of the ratio network, fitted for at most ``steps`` against the averaged generator.

        None without validation data or without steps.
        """
        iteration, config = self.iteration, self.config
        held_out = self._held_out["validation"]
        if not len(held_out[1]) or not steps:
            return None
        options = RefitOptions(
            steps=steps,
            learning_rate=config.ratio_lr / 2,
            weight_decay=UNLEARNING,
            check_every=max(1, steps // 4),
            patience=4,
            held_out_pairs=min(HELD_OUT_PAIRS, LEVELS * self.images),
            shared_noise=config.ratio_shared_noise,
        )
        seed = (config.seed + EVALUATION_SEED) % 2**63
        size = min(config.batch_size, config.micro_batch or config.batch_size)
        source = self.dataset.batches("train", size, seed=seed, start=iteration.state.step)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for number, batch in enumerate(source):
                real, labels = iteration.to_device(batch)
                rng = ops.make_rng(seed, number, iteration.device)
                index = torch.arange(len(labels), device=iteration.device)
                yield flip(real, rng, index, config.flip_probability), labels

        with contextlib.closing(source):  # type: ignore[type-var]
            return refit(
                iteration.state.ratio, iteration.state.average, batches(), held_out, iteration.ratio_law,
                options=options, seed=seed,
            )  # fmt: skip

    def loss_by_sigma(self) -> tuple[dict[str, Any], Refitted | None]:
        """The fields of an evaluation's line in metrics.jsonl, and the refitted copy of the ratio network."""
        validation, train = (self.bound(split, every_level=True) for split in ("validation", "train"))
        fields: dict[str, Any] = {
            "sigma": self._levels(self.iteration.ratio_law).tolist(),
            "divergence": validation.value,
            "divergence_error": validation.error,
            "divergence_train": train.value,
            "divergence_train_error": train.error,
            "divergence_by_sigma": validation.by_level,
            "divergence_train_by_sigma": train.by_level,
            "ratio_accuracy_by_sigma": validation.accuracy,
        }
        if len(self._held_out["validation"][1]):
            fields |= self._generator_gradient()
        fitted = self.refitted(self.config.refit_steps)
        if fitted is not None:
            fields |= {"divergence_refit": fitted.bound, "divergence_refit_by_sigma": fitted.by_level}
        return fields, fitted

    def calibrations(self, fitted: Refitted | None) -> dict[str, list[dict[str, Any]]]:
        """Calibration for the averaged generator, on the validation split, of each ratio network."""
        state = self.iteration.state
        real, labels = self._held_out["validation"]
        if len(labels) < 2:
            return {}
        found: dict[str, nn.Module | None] = {
            "online": state.ratio,
            "average": state.ratio_average,
            "refitted": None if fitted is None else fitted.network,
        }
        sigmas = noise_levels(self.iteration.ratio_law, LEVELS).tolist()
        return {
            name: [
                row.as_dict()
                for row in calibrate(
                    network.eval(),
                    state.average,
                    real,
                    labels,
                    sigmas,
                    seed=EVALUATION_SEED,
                    fakes=min(CALIBRATION_SAMPLES, self.images),
                    draws=1,
                )
            ]
            for name, network in found.items()
            if network is not None
        }

    def noise_histograms(self) -> dict[str, Any]:
        """Fractions of both noise laws in equal bins of log sigma, between ``edges``."""
        laws = {"ratio": self.iteration.ratio_law, "generator": self.iteration.generator_law}
        uniform = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
        drawn = {name: law.quantile(uniform).log10() for name, law in laws.items()}
        low = min(float(values.quantile(0.001)) for values in drawn.values())
        high = max(float(values.quantile(0.999)) for values in drawn.values())
        high = max(high, low + 1e-6)
        shares = {
            name: (values.histc(HISTOGRAM_BINS, low, high) / len(values)).tolist()
            for name, values in drawn.items()
        }
        edges = torch.logspace(low, high, HISTOGRAM_BINS + 1, dtype=torch.float64).tolist()
        return {"edges": edges, **shares}

    @property
    def features(self) -> str:
        """What distances are measured on, in words; "none" where they are not."""
        return "none" if self.quality is None else self.quality.space.name

    def _generate(self, split: str) -> tuple[Tensor, Tensor]:
        assert self.quality is not None
        labels = self.quality.labels(split, self.images)
        return networks.generate(self.iteration.state.average, labels, EVALUATION_SEED), labels

    def validation_distance(self) -> float | None:
        """Fréchet distance of the averaged generator to the validation split; None without features."""
        if self.quality is None or not self.quality.has("validation"):
            return None
        return self.quality.distance(self._generate("validation")[0], "validation")

    def summary(self) -> dict[str, Any]:
        """The final metrics against the test split; empty without features or test images."""
        if self.quality is None or not self.quality.has("test"):
            return {}
        return self.quality.summary(*self._generate("test"))

    def _grid_labels(self) -> Tensor:
        classes = len(self.dataset.class_names)
        if classes == 1:
            return torch.zeros(GRID_ROWS * GRID_COLUMNS, dtype=torch.int64)
        return torch.arange(min(classes, GRID_ROWS)).repeat_interleave(GRID_COLUMNS)

    def grid_png(self) -> bytes:
        """Images of fixed latents by the EMA generator, one row per class, as PNG."""
        images = networks.generate(self.iteration.state.average, self._grid_labels(), GRID_SEED)
        names = self.dataset.class_names[:GRID_ROWS] if len(self.dataset.class_names) > 1 else ()
        return png(grid(viewable(images, self.dataset.scaling), GRID_COLUMNS, labels=names))

    def neighbors_png(self) -> bytes | None:
        """A row per sample: itself, then its nearest training images; None without features."""
        if self.quality is None:
            return None
        labels = self._grid_labels()[::GRID_COLUMNS]
        samples = networks.generate(self.iteration.state.average, labels, GRID_SEED)
        nearest = self.quality.nearest(samples, NEIGHBORS)
        records, _ = self.dataset.first("train", len(self.quality.train[1]))
        found = self.quality.x0(records[nearest.flatten()]).double().cpu()
        rows = torch.cat(
            (samples.double().cpu()[:, None], found.reshape(*nearest.shape, *samples.shape[1:])), 1
        )
        return png(grid(viewable(rows.flatten(0, 1), self.dataset.scaling), nearest.shape[1] + 1))
