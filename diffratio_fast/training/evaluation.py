"""What a run measures of itself: the divergence on held-out data, the generated images, the pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from diffratio_fast import networks, ops
from diffratio_fast.config import TrainConfig
from diffratio_fast.data import DataSet
from diffratio_fast.images import grid, png, to_uint8
from diffratio_fast.metrics.pixels import PixelMetrics
from diffratio_fast.networks import latents_for
from diffratio_fast.objectives.diffratio import log_ratio_pair
from diffratio_fast.objectives.divergences import jensen_shannon_bound
from diffratio_fast.objectives.noise_laws import sample_sigma
from diffratio_fast.training.iteration import Iteration

SAMPLES = 10_000
"""Images behind a Fréchet distance."""
HELD_OUT = 512
"""Held-out images behind a divergence estimate, at most."""
EVALUATION_SEED = 20_240_217
"""Seed of the images that are measured: the same for every run, so that figures compare."""
GRID_SEED = 1
GRID_COLUMNS = 12
GRID_ROWS = 10


@dataclass
class Evaluation:
    """Measurements of a run's state; none of them changes it."""

    config: TrainConfig
    dataset: DataSet
    iteration: Iteration

    @cached_property
    def pixels(self) -> PixelMetrics | None:
        return PixelMetrics(self.dataset) if PixelMetrics.suits(self.dataset) else None

    @cached_property
    def _held_out(self) -> dict[str, tuple[Tensor, Tensor]]:
        return {
            split: self.iteration.to_device(self.dataset.first(split, HELD_OUT))
            for split in ("train", "validation")
        }

    @torch.no_grad()
    def divergence(self, split: str) -> Tensor:
        """Bound on the Jensen-Shannon divergence, nats, of reals of a split and fresh fakes: a scalar.

        Of the noised distributions, averaged over the ratio network's noise law, under the online networks;
        each fake has its real partner's label and noise level.
        """
        iteration, state = self.iteration, self.iteration.state
        real, labels = self._held_out[split]
        rng = ops.make_rng(self.config.seed, state.step, iteration.device)
        index = torch.arange(len(labels), device=iteration.device)
        state.ratio.eval()
        latents = latents_for(state.generator, rng, index, ops.Purpose.SAMPLE_LATENT)
        fake = iteration.generator(latents, labels)
        sigma, _ = sample_sigma(iteration.ratio_law, rng, index, ops.Purpose.EVALUATION_SIGMA)
        halves = log_ratio_pair(
            iteration.ratio,
            real,
            fake,
            sigma[:, 0].to(real.dtype),
            labels,
            rng,
            index,
            (ops.Purpose.EVALUATION_REAL, ops.Purpose.EVALUATION_FAKE),
        )
        return jensen_shannon_bound(*halves)

    def _generate(self, split: str) -> tuple[Tensor, Tensor]:
        assert self.pixels is not None
        labels = self.pixels.labels(split, SAMPLES)
        return networks.generate(self.iteration.state.average, labels, EVALUATION_SEED), labels

    def validation_distance(self) -> float | None:
        """Fréchet distance of the EMA generator to the validation split; None where pixels do not suit."""
        if self.pixels is None:
            return None
        return self.pixels.distance(self._generate("validation")[0], "validation")

    def summary(self) -> dict[str, Any]:
        """The final figures against the test split; empty where pixels do not suit."""
        if self.pixels is None:
            return {}
        return self.pixels.summary(*self._generate("test"))

    def grid_png(self) -> bytes:
        """Fixed latents through the EMA generator, a row per class, as PNG."""
        classes = len(self.dataset.class_names)
        labels = torch.arange(min(classes, GRID_ROWS)).repeat_interleave(GRID_COLUMNS)
        if classes == 1:
            labels = torch.zeros(GRID_ROWS * GRID_COLUMNS, dtype=torch.int64)
        images = networks.generate(self.iteration.state.average, labels, GRID_SEED)
        return png(grid(to_uint8(images, self.dataset.scaling), GRID_COLUMNS))
