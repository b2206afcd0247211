"""A step of pre-training."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.networks.edm2 import EDM2Denoiser
from diffratio_fast.networks.layers import dropout_stream
from diffratio_fast.objectives import geometric
from diffratio_fast.objectives.denoising import DenoiserCall, denoising_errors, denoising_loss
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.training.processes.parallel import Parallel
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state.denoiser import WATCHED, PretrainState
from diffratio_fast.training.state.ema import average_decay
from diffratio_fast.training.state.optimizers import set_rate
from diffratio_fast.training.state.posthoc_ema import kept_weights, kept_with_weights
from diffratio_fast.training.state.watch import Watch
from diffratio_fast.training.step.finite import FiniteCheck
from diffratio_fast.training.step.stepper import Batch, Stepper, learning_rate_factor


class PretrainIteration(Stepper):
    """The pure function (state, step, batch) -> state of a pre-training step."""

    state: PretrainState

    def __init__(
        self,
        config: PretrainConfig,
        scaling: Scaling,
        state: PretrainState,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        super().__init__(config, scaling, state.step, device, world)
        self.config: PretrainConfig = config
        self.state = state
        self.law = config.noise_law("noise")
        self.denoiser = self.in_precision(state.denoiser)
        self.average = self.in_precision(state.average)
        self.loss_of = Parallel(state.denoiser, self._loss, world, config)
        skip = config.on_nonfinite == "skip"
        self.checks = {"denoiser": FiniteCheck("denoiser", state.denoiser, skip=skip, world=world)}
        self.watch = Watch(WATCHED, state.statistics, state.bad_steps)

    def trained(self) -> dict[str, nn.Module]:
        return {"denoiser": self.state.denoiser}

    def settle(self, batch: Batch) -> None:
        self.state.denoiser.eval()
        loss, _ = self.loss_of(*self.part(batch, self.parts[0]))
        (loss * 0).backward()
        self.state.optimizer.zero_grad(set_to_none=True)

    def begin(self) -> None:
        config, step = self.config, self.state.step
        self.rng[1].fill_(step)
        set_rate(self.state.optimizer, config.lr * learning_rate_factor(config, step))
        self.set("average", 1 - average_decay(config, step, step))
        for name, weight in kept_weights(config, step).items():
            self.set(name, weight)

    def compute(self, batches: list[Batch], variant: Hashable) -> None:
        state = self.state
        (batch,) = batches
        state.denoiser.train()
        self.loss_of.prepare()
        state.optimizer.zero_grad(set_to_none=True)
        means = torch.zeros(2, dtype=torch.float64, device=self.device)
        for part in self.parts:
            x0, labels, index = self.part(batch, part)
            with (
                dropout_stream(state.denoiser, self.rng, index),
                self.loss_of.part(last=self.is_last(part)),
            ):
                loss, error = self.loss_of(x0, labels, index)
                (loss * self.share(index)).backward()
            means += torch.stack((loss.detach().double(), error)) * self.share(index)
        self.world.mean(means)
        state.sums[:2] += means
        state.sums[2] += 1
        check = self.checks["denoiser"]
        averages = [(state.average, self.numbers["average"])]
        averages += kept_with_weights(self.config, state.kept, self.numbers)
        self.update(check, {"the loss": means[0]}, state.optimizer, averages)
        self.watch.note(check.latest)

    def _loss(self, x0: Tensor, labels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of a part of a batch, and its mean error (float64, detached)."""
        sigma = sample_sigma(self.law, self.rng, index, ops.Purpose.DENOISING_SIGMA)[0][:, 0].to(self.dtype)
        denoiser, x0 = self._augmented(x0, index)
        errors = denoising_errors(
            denoiser, x0, sigma, labels, self.rng, index, ops.Purpose.DENOISING_NOISE,
            stable_targets=self.config.stable_targets,
        )  # fmt: skip
        return denoising_loss(errors, self._log_variance(sigma)), errors.detach().double().mean()

    def _augmented(self, x0: Tensor, index: Tensor) -> tuple[DenoiserCall, Tensor]:
        """The randomly transformed images, and the denoiser with the labels of the transforms."""
        probability = self.config.augment_probability
        if probability == 0:
            return self.denoiser, x0
        transform = geometric.random_transform(self.rng, index, probability)
        augment_labels = transform.labels().to(x0.dtype)
        return lambda x, sigma, labels: self.denoiser(x, sigma, labels, augment_labels), geometric.apply(
            transform, x0
        )

    def _log_variance(self, sigma: Tensor) -> Tensor | None:
        denoiser = self.state.denoiser
        return denoiser.log_variance(sigma) if isinstance(denoiser, EDM2Denoiser) else None

    @torch.no_grad()
    def validation_error(self, held_out: Batch) -> float:
        """Mean weighted error of the average over held-out images, with fixed noise."""
        rng = ops.make_rng(self.config.seed, 0, self.device)
        total = 0.0
        x0, labels = held_out
        for chosen in torch.arange(len(labels), device=self.device).split(self.parts[0].stop):
            sigma = sample_sigma(self.law, rng, chosen, ops.Purpose.EVALUATION_SIGMA)[0][:, 0]
            errors = denoising_errors(
                self.average, x0[chosen], sigma.to(self.dtype), labels[chosen], rng, chosen,
                ops.Purpose.EVALUATION_REAL,
            )  # fmt: skip
            total += float(errors.double().sum())
        return total / len(labels)
