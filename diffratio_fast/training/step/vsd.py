"""The training iteration of score distillation."""

from __future__ import annotations

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.scaling import SIGMA_DATA, Scaling
from diffratio_fast.networks.edm2 import EDM2Denoiser
from diffratio_fast.objectives import vsd
from diffratio_fast.objectives.denoising import denoising_loss
from diffratio_fast.objectives.diffratio import RatioLoss, ScoreDifference
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state.generator import TrainState
from diffratio_fast.training.step.generator import Iteration


class VSDIteration(Iteration):
    """An iteration with a student denoiser as online network and the score difference of two denoisers."""

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

    def online_loss(
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

    def generator_direction(
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
        # the mean that ``Iteration`` checks for NaN is that of the distance
        return ScoreDifference(outcome.gradient, outcome.distance, never, torch.ones_like(sigma)), None
