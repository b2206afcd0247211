"""Training steps whose score difference is that of two denoisers: score distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.scaling import SIGMA_DATA, Scaling
from diffratio_fast.networks.edm2 import EDM2Denoiser
from diffratio_fast.objectives import vsd
from diffratio_fast.objectives.denoising import denoising_errors, denoising_loss
from diffratio_fast.objectives.diffratio import RatioLoss, ScoreDifference
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.objectives.vsd import DenoiserDifference
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state.generator import TrainState
from diffratio_fast.training.step.generator import Iteration


class DenoisersIteration(Iteration):
    """An iteration that trains a denoiser online, without log ratio; a subclass defines the difference."""

    SOURCE = "the difference of the denoisers"

    def difference(
        self, fake: Tensor, sigma: Tensor, labels: Tensor, rng: Tensor, index: Tensor, weight: Tensor
    ) -> DenoiserDifference:
        """The generator's direction at noise levels sigma [B, K]; see ``vsd.score_difference``."""
        raise NotImplementedError

    def evaluation_errors(
        self, fake: Tensor, sigma: Tensor, labels: Tensor, rng: Tensor, index: Tensor
    ) -> Tensor:
        """Weighted errors [B] of denoising generated images at sigma [B], for measurements."""
        raise NotImplementedError

    def generator_direction(
        self, fake: Tensor, labels: Tensor, index: Tensor
    ) -> tuple[ScoreDifference, Tensor | None]:
        sigma, _ = sample_sigma(
            self.generator_law, self.rng, index, ops.Purpose.SIGMA_GENERATOR, draws=self.config.noise_draws
        )
        sigma = sigma.to(self.dtype)
        outcome = self.difference(fake, sigma, labels, self.rng, index, self.weight(sigma, SIGMA_DATA))
        never = torch.zeros_like(outcome.distance, dtype=torch.bool)
        # the mean that ``Iteration`` checks for NaN is that of the distance
        return ScoreDifference(outcome.gradient, outcome.distance, never, torch.ones_like(sigma)), None

    def ratio_levels(self, index: Tensor, substep: int) -> Tensor:
        """Noise levels [B] of a step of the online network."""
        sigma, _ = sample_sigma(self.ratio_law, self.rng, index, ops.Purpose.SIGMA_RATIO, substep=substep)
        return sigma[:, 0].to(self.dtype)


class VSDIteration(DenoisersIteration):
    """Score distillation: a student denoiser of generated images, and a frozen teacher."""

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

    def online_loss(
        self, real: Tensor, fake: Tensor, labels: Tensor, index: Tensor, substep: int
    ) -> RatioLoss:
        """The student's loss; the real half of the batch is not used, and there are no log ratios."""
        level = self.ratio_levels(index, substep)
        errors = vsd.student_errors(
            self.student, fake, level, labels, self.rng, index, substep=substep,
            stable_targets=self.config.stable_targets,
        )  # fmt: skip
        student = self.state.ratio
        log_variance = student.log_variance(level) if isinstance(student, EDM2Denoiser) else None
        nothing = torch.zeros_like(errors.detach())
        return RatioLoss(denoising_loss(errors, log_variance), nothing, nothing)

    def difference(
        self, fake: Tensor, sigma: Tensor, labels: Tensor, rng: Tensor, index: Tensor, weight: Tensor
    ) -> DenoiserDifference:
        return vsd.score_difference(
            self.student, self.teacher, fake, sigma, labels, rng, index,
            weight=weight, normalize=self.config.vsd_normalize,
        )  # fmt: skip

    def evaluation_errors(
        self, fake: Tensor, sigma: Tensor, labels: Tensor, rng: Tensor, index: Tensor
    ) -> Tensor:
        purpose = ops.Purpose.EVALUATION_FAKE
        return denoising_errors(self.student, fake, sigma, labels, rng, index, purpose)
