"""Score distillation in the trainer: what its iteration and its measurements have of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.config import TrainConfig
from diffratio_fast.data import SIGMA_DATA, Scaling
from diffratio_fast.networks import latents_for
from diffratio_fast.networks.edm2 import EDM2Denoiser
from diffratio_fast.objectives import vsd
from diffratio_fast.objectives.denoising import denoising_errors, denoising_loss
from diffratio_fast.objectives.diffratio import RatioLoss, ScoreDifference
from diffratio_fast.objectives.held_out import in_chunks
from diffratio_fast.objectives.noise_laws import sample_sigma
from diffratio_fast.objectives.refit import Refitted
from diffratio_fast.training.distributed import ALONE, World
from diffratio_fast.training.evaluation import Evaluation
from diffratio_fast.training.iteration import Iteration
from diffratio_fast.training.state import TrainState


class VSDIteration(Iteration):
    """An iteration whose online network is a student denoiser, and whose score difference is that of two."""

    SOURCE = "the difference of the denoisers"

    def __init__(
        self,
        config: TrainConfig,
        scaling: Scaling,
        state: TrainState,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        super().__init__(config, scaling, state, device, world)
        assert state.teacher is not None
        self.student, self.teacher = self.ratio, self.in_precision(state.teacher)
        self.checks["ratio"].role = "student"

    def _ratio_loss(
        self, real: Tensor, fake: Tensor, labels: Tensor, index: Tensor, substep: int
    ) -> RatioLoss:
        """The student's loss; the real half of the batch is not used, and there are no log ratios."""
        sigma, _ = sample_sigma(self.ratio_law, self.rng, index, ops.Purpose.SIGMA_RATIO, substep=substep)
        level = sigma[:, 0].to(self.dtype)
        errors = vsd.student_errors(self.student, fake, level, labels, self.rng, index, substep=substep)
        student = self.state.ratio
        log_variance = student.log_variance(level) if isinstance(student, EDM2Denoiser) else None
        nothing = torch.zeros_like(errors.detach())
        return RatioLoss(denoising_loss(errors, log_variance), nothing, nothing)

    def _score_difference(
        self, fake: Tensor, labels: Tensor, index: Tensor
    ) -> tuple[ScoreDifference, Tensor | None]:
        sigma, _ = sample_sigma(
            self.generator_law, self.rng, index, ops.Purpose.SIGMA_GENERATOR, draws=self.config.noise_draws
        )
        sigma = sigma.to(self.dtype)
        outcome = vsd.score_difference(
            self.student, self.teacher, fake, sigma, labels, self.rng, index,
            weight=self.weight(sigma, SIGMA_DATA), normalize=self.config.vsd_normalize,
        )  # fmt: skip
        never = torch.zeros_like(outcome.distance, dtype=torch.bool)
        # the mean that ``Iteration`` watches for NaN is that of the distance
        return ScoreDifference(outcome.gradient, outcome.distance, never, torch.ones_like(sigma)), None


class VSDEvaluation(Evaluation):
    """Measurements of a run without ratio network: no divergence, but errors of the student."""

    def running(self, mean: dict[str, float]) -> dict[str, Any]:
        return {"student_loss": mean["ratio_loss"]}

    def refitted(self, steps: int) -> Refitted | None:
        return None

    def calibrations(self, fitted: Refitted | None) -> dict[str, list[dict[str, Any]]]:
        return {}

    @torch.no_grad()
    def loss_by_sigma(self) -> tuple[dict[str, Any], Refitted | None]:
        """Errors of the student at fresh fakes, and the size of the score difference there."""
        iteration, state = self.iteration, self.iteration.state
        assert isinstance(iteration, VSDIteration)
        levels = self._levels(iteration.ratio_law)
        fields: dict[str, Any] = {"sigma": levels.tolist()}
        _, labels = self._held_out["validation"]
        if not len(labels):
            return fields, None
        rng, index = self._random(len(labels))
        state.ratio.eval()
        latents = latents_for(state.generator, rng, index, ops.Purpose.SAMPLE_LATENT)
        fake = in_chunks(iteration.generator, latents, labels)
        errors: list[float] = []
        for level in levels:
            sigma = level.to(fake.dtype).expand(len(labels))
            found = [
                denoising_errors(
                    iteration.student, fake[part], sigma[part], labels[part], rng, part,
                    ops.Purpose.EVALUATION_FAKE,
                )
                for part in self._passes(index)
            ]  # fmt: skip
            errors.append(float(torch.cat(found).double().mean()))
        norms, sizes = [], []
        generator_levels = self._levels(iteration.generator_law)
        for level in generator_levels:
            sigma = level.to(fake.dtype).expand(len(labels), 1)
            weight = iteration.weight(sigma, SIGMA_DATA)
            found = [
                vsd.score_difference(
                    iteration.student, iteration.teacher, fake[part], sigma[part], labels[part], rng, part,
                    weight=weight[part], normalize=self.config.vsd_normalize,
                ).gradient.flatten(1)
                for part in self._passes(index)
            ]  # fmt: skip
            size = float(torch.cat(found).double().norm(dim=1).mean())
            sizes.append(size)
            norms.append(size / float(weight[0, 0]))
        total = sum(sizes) or 1.0
        return fields | {
            "student_error_by_sigma": errors,
            "generator_sigma": generator_levels.tolist(),
            "log_ratio_gradient_by_sigma": norms,
            "generator_gradient_share": [size / total for size in sizes],
        }, None
