"""Evaluations of a run that trains a denoiser online: score distillation, conditional denoiser."""

from __future__ import annotations

from typing import Any

import torch

from diffratio_fast import ops
from diffratio_fast.data.scaling import SIGMA_DATA
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.objectives.held_out import in_chunks
from diffratio_fast.objectives.refit import Refitted
from diffratio_fast.progress import format_metric
from diffratio_fast.training.monitor import Evaluation
from diffratio_fast.training.step.vsd import DenoisersIteration


class VSDEvaluation(Evaluation):
    """Measurements of a run without ratio network: no divergence, but errors of the online denoiser."""

    def running(self, mean: dict[str, float]) -> dict[str, Any]:
        return {"student_loss": mean["ratio_loss"]}

    def shown(self, values: dict[str, Any]) -> dict[str, str]:
        return {"student": format_metric(values["student_loss"])}

    def refitted(self, steps: int) -> Refitted | None:
        return None

    def calibrations(self, fitted: Refitted | None) -> dict[str, list[dict[str, Any]]]:
        return {}

    def _measure_levels(self) -> None:
        self.loss_by_sigma()

    @torch.no_grad()
    def loss_by_sigma(self) -> tuple[dict[str, Any], Refitted | None]:
        """Errors of the online denoiser at fresh fakes, and the size of the score difference there."""
        iteration, state = self.iteration, self.iteration.state
        assert isinstance(iteration, DenoisersIteration)
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
                iteration.evaluation_errors(fake[part], sigma[part], labels[part], rng, part)
                for part in self._passes(index)
            ]
            errors.append(float(torch.cat(found).double().mean()))
        norms, sizes = [], []
        generator_levels = self._levels(iteration.generator_law)
        for level in generator_levels:
            sigma = level.to(fake.dtype).expand(len(labels), 1)
            weight = iteration.weight(sigma, SIGMA_DATA)
            found = [
                iteration.difference(
                    fake[part], sigma[part], labels[part], rng, part, weight[part]
                ).gradient.flatten(1)
                for part in self._passes(index)
            ]
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
