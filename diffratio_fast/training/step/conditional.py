"""Training step of the conditional denoiser: its loss and its score difference in the trainer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet, model_shape
from diffratio_fast.errors import UserError
from diffratio_fast.networks.conditional import ConditionalDenoiser
from diffratio_fast.objectives import conditional
from diffratio_fast.objectives.denoising import denoising_errors
from diffratio_fast.objectives.diffratio import RatioLoss
from diffratio_fast.objectives.vsd import DenoiserDifference
from diffratio_fast.training.step.vsd import DenoisersIteration


def network(config: TrainConfig, dataset: DataSet) -> nn.Module:
    """The online network: ``--backbone`` with a second read-out."""
    try:
        return ConditionalDenoiser(
            model_shape(dataset), len(dataset.class_names), backbone=config.backbone,
            options=config.backbone_arguments, gain=config.conditional_rate,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(f"--objective conditional, --backbone {config.backbone}: {error}") from None


class ConditionalIteration(DenoisersIteration):
    """An iteration whose online network denoises real and generated images, and gives their difference."""

    def online_loss(
        self, real: Tensor, fake: Tensor, labels: Tensor, index: Tensor, substep: int
    ) -> RatioLoss:
        """The denoising loss of both halves; there are no log ratios."""
        errors = conditional.conditional_errors(
            self._call, real, fake, self.ratio_levels(index, substep), labels, self.rng, index,
            self.purposes, substep=substep, stable_targets=self.config.stable_targets,
        )  # fmt: skip
        nothing = torch.zeros_like(errors.detach())
        return RatioLoss(errors.mean(), nothing, nothing)

    def _call(self, noised: Tensor, sigma: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        image, difference = self.ratio(noised, sigma, labels)
        return image, difference

    def difference(
        self, fake: Tensor, sigma: Tensor, labels: Tensor, rng: Tensor, index: Tensor, weight: Tensor
    ) -> DenoiserDifference:
        return conditional.score_difference(self._call, fake, sigma, labels, rng, index, weight=weight)

    def evaluation_errors(
        self, fake: Tensor, sigma: Tensor, labels: Tensor, rng: Tensor, index: Tensor
    ) -> Tensor:
        def of_generated(noised: Tensor, level: Tensor, c: Tensor) -> Tensor:
            image, difference = self._call(noised, level, c)
            return image - difference / 2

        purpose = ops.Purpose.EVALUATION_FAKE
        return denoising_errors(of_generated, fake, sigma, labels, rng, index, purpose)
