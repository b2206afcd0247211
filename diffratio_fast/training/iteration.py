"""One training iteration: ratio steps, one generator step, the average. Nothing here waits for the device."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from diffratio_fast import ops
from diffratio_fast.command import UserError
from diffratio_fast.config import TrainConfig
from diffratio_fast.data import SIGMA_DATA, Scaling
from diffratio_fast.networks import latents_for
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.objectives import diffratio, fused
from diffratio_fast.objectives.augmentation import flip, roll, roll_shifts
from diffratio_fast.objectives.bin_means import bins, update_means
from diffratio_fast.objectives.diffratio import RatioLoss, RatioNetwork, ScoreDifference
from diffratio_fast.objectives.divergences import DIVERGENCES
from diffratio_fast.objectives.noise_laws import NoiseLaw, parse_noise_law, sample_sigma
from diffratio_fast.objectives.weights import WEIGHTS
from diffratio_fast.training.ema import ema_decay, update_average
from diffratio_fast.training.state import TrainState

Batch = tuple[Tensor, Tensor]


def noise_laws(config: TrainConfig) -> tuple[NoiseLaw, NoiseLaw]:
    """The ratio's and the generator's law of sigma; the generator's must lie inside the ratio's support."""
    ratio = parse_noise_law(config.ratio_noise)
    generator = ratio if config.generator_noise is None else parse_noise_law(config.generator_noise)
    if not ratio.covers(generator):
        raise UserError(
            f"generator_noise {generator.name} reaches outside ratio_noise {ratio.name}: "
            "the ratio is not learned there"
        )
    return ratio, generator


def learning_rate_factor(config: TrainConfig, step: int) -> float:
    """The schedule's factor at ``step``: rising to 1, then constant or falling to ``lr_final``."""
    done = min(step / config.steps, 1.0)
    fall = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 + 0.5 * math.cos(math.pi * done)}
    share = config.lr_final + (1.0 - config.lr_final) * fall[config.lr_schedule]
    return share * min(1.0, (step + 1) / (config.lr_warmup_steps + 1))


def generator_factor(config: TrainConfig, step: int) -> float:
    """What warm-up and ramp make of the generator's rate: 0 in the warm-up, then rising to 1."""
    since = step - config.ratio_warmup_steps
    if since < 0:
        return 0.0
    return min(1.0, (since + 1) / (config.generator_ramp_steps + 1))


@dataclass
class Iteration:
    """The pure function (state, step, batches) -> state, for one configuration on one device."""

    config: TrainConfig
    scaling: Scaling
    state: TrainState
    device: torch.device

    def __post_init__(self) -> None:
        config, state = self.config, self.state
        self.ratio_law, self.generator_law = noise_laws(config)
        self.divergence = DIVERGENCES[config.divergence]
        self.weight = WEIGHTS[config.weight]
        self.dtype = torch.float64 if config.precision == "float64" else torch.float32
        self.index = torch.arange(config.batch_size, device=self.device)
        generator: Callable[..., Tensor] = state.generator
        ratio: Callable[..., Tensor] = state.ratio
        if config.compile:
            generator, ratio = torch.compile(generator), torch.compile(ratio)
        self.generator = self._in_precision(generator)
        self.ratio: RatioNetwork = self._in_precision(ratio)
        # the fused operations add the noise themselves, so no roll can come between noise and network
        fits = isinstance(state.ratio, RatioMixer) and config.ratio_roll_probability == 0
        self.mixer = cast(RatioMixer, state.ratio) if fits else None
        self.mixer_dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        self.rng = ops.make_rng(config.seed, state.step, self.device)
        self.gradient_norm = torch.zeros((), device=self.device)

    def _in_precision(self, network: Callable[..., Tensor]) -> Callable[..., Tensor]:
        if self.config.precision != "bfloat16":
            return network

        def call(*arguments: Tensor) -> Tensor:
            with torch.autocast(self.device.type, torch.bfloat16):
                output = network(*arguments)
            return output.float()

        return call

    def to_device(self, batch: Batch) -> Batch:
        records, labels = batch
        x0 = self.scaling.to_model(records.to(self.device, non_blocking=True)).to(self.dtype)
        return x0, labels.to(self.device, non_blocking=True)

    def _augmented(self, copies: int, rng: Tensor, *, substep: int, draws: int = 1) -> RatioNetwork:
        """The ratio network behind this step's random rolls, the same for all ``copies`` of a sample."""
        probability, reach = self.config.ratio_roll_probability, self.config.ratio_roll_reach
        if probability == 0:
            return self.ratio
        shifts = torch.cat(
            [
                roll_shifts(rng, self.index, probability, reach, substep=substep, draw=draw)
                for draw in range(draws)
            ]
        ).repeat(copies, 1)
        return lambda noised, sigma, labels: self.ratio(roll(noised, shifts), sigma, labels)

    def _fakes(self, rng: Tensor, labels: Tensor, substep: int) -> Tensor:
        latents = latents_for(self.state.generator, rng, self.index, ops.Purpose.LATENT, substep=substep)
        return self.generator(latents, labels)

    def _ratio_step(self, batch: Batch, fake: Tensor, rng: Tensor, substep: int) -> None:
        real, labels = batch
        real = flip(real, rng, self.index, self.config.flip_probability, substep=substep)
        sigma, _ = sample_sigma(self.ratio_law, rng, self.index, ops.Purpose.SIGMA_RATIO, substep=substep)
        arguments = (real, fake, sigma[:, 0].to(self.dtype), labels, rng, self.index)
        outcome: RatioLoss
        if self.mixer is not None:
            outcome = fused.ratio_loss(self.mixer, *arguments, substep=substep, dtype=self.mixer_dtype)
        else:
            network = self._augmented(2, rng, substep=substep)
            outcome = diffratio.ratio_loss(network, *arguments, substep=substep)
        self.state.ratio_optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        self.state.ratio_optimizer.step()
        if substep == 0:
            real_half, fake_half = outcome.log_ratio_real, outcome.log_ratio_fake
            values = (
                outcome.loss.detach(),
                (real_half > 0).double().mean(),
                (fake_half < 0).double().mean(),
                real_half.mean(),
                fake_half.mean(),
            )
            self.state.sums[:5] += torch.stack([value.double() for value in values])
            self.state.sums[6] += 1

    def _generator_step(self, fake: Tensor, labels: Tensor, rng: Tensor, measure: bool) -> None:
        config, state = self.config, self.state
        draws = config.noise_draws
        sigma, uniforms = sample_sigma(
            self.generator_law, rng, self.index, ops.Purpose.SIGMA_GENERATOR, draws=draws
        )
        sigma = sigma.to(self.dtype)
        bin_of = bins(uniforms) if config.normalize_h else None
        arguments = (fake, sigma, labels, rng, self.index)
        keywords: dict[str, Any] = {
            "weight": self.weight(sigma, SIGMA_DATA),
            "divergence": self.divergence,
            "h_mean": None if bin_of is None else state.h_means[bin_of],
        }
        outcome: ScoreDifference
        state.ratio.requires_grad_(False)
        if self.mixer is not None:
            outcome = fused.score_difference(self.mixer, *arguments, **keywords, dtype=self.mixer_dtype)
        else:
            # rolls of the generator step have a substep of their own, after those of the ratio steps
            network = self._augmented(1, rng, substep=255, draws=draws)
            outcome = diffratio.score_difference(network, *arguments, **keywords)
        state.ratio.requires_grad_(True)
        state.generator_optimizer.zero_grad(set_to_none=True)
        fake.backward(outcome.gradient.to(fake.dtype) / config.batch_size)
        state.generator_optimizer.step()
        if bin_of is not None:
            update_means(state.h_means, bin_of, outcome.h)
        if self.divergence.clamp is not None:
            state.sums[5] += outcome.clamped.double().mean()
        if measure:
            gradients = [p.grad for p in state.generator.parameters() if p.grad is not None]
            self.gradient_norm = torch.nn.utils.get_total_norm(gradients)

    def run(self, batches: list[Batch], *, measure: bool = False) -> None:
        """Advance the state by one step on ``config.ratio_steps`` batches of (records, labels).

        ``measure`` keeps the norm of the generator's gradient in ``gradient_norm`` (on the device).
        """
        config, state = self.config, self.state
        step = state.step
        rng = self.rng
        rng[1].fill_(step)  # in place: a new tensor each step would make the host wait for a GPU
        factor = learning_rate_factor(config, step)
        _set_rate(state.ratio_optimizer, config.ratio_lr * factor)
        generator_share = generator_factor(config, step)
        _set_rate(state.generator_optimizer, config.generator_lr * factor * generator_share)
        trains = generator_share > 0
        state.ratio.train()
        state.generator.train()

        first = self.to_device(batches[0])
        # one forward serves both steps: detached for the ratio, with its graph for the generator
        with contextlib.nullcontext() if trains else torch.no_grad():
            fake = self._fakes(rng, first[1], 0)
        self._ratio_step(first, fake, rng, 0)
        for substep, batch in enumerate(batches[1:], 1):
            extra = self.to_device(batch)
            with torch.no_grad():
                extra_fake = self._fakes(rng, extra[1], substep)
            self._ratio_step(extra, extra_fake, rng, substep)
        if state.ratio_average is not None and config.ratio_ema_half_life_images is not None:
            decay = ema_decay(
                step, config.batch_size, config.ratio_ema_half_life_images, config.ema_rampup_ratio
            )
            update_average(state.ratio_average, state.ratio, decay)
        if trains:
            state.ratio.eval()
            self._generator_step(fake, first[1], rng, measure)
            decay = ema_decay(step, config.batch_size, config.ema_half_life_images, config.ema_rampup_ratio)
            update_average(state.average, state.generator, decay)
        state.step += 1


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
