"""One training iteration: ratio steps, one generator step, the average. Nothing here synchronizes."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffratio_fast import ops
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.scaling import SIGMA_DATA, Scaling
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.networks.generate import latents_for
from diffratio_fast.networks.layers import dropout_stream
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.objectives import diffratio, fused
from diffratio_fast.objectives.augmentation import roll, roll_shifts
from diffratio_fast.objectives.bin_means import BINS, bin_sums, bins, update_means
from diffratio_fast.objectives.diffratio import RatioLoss, RatioNetwork, ScoreDifference
from diffratio_fast.objectives.matching import matched
from diffratio_fast.objectives.sigma import sample_sigma
from diffratio_fast.objectives.weights import WEIGHTS, loss_weight
from diffratio_fast.training.processes.parallel import Parallel
from diffratio_fast.training.processes.world import ALONE, World
from diffratio_fast.training.state.ema import average_decay, ema_decay
from diffratio_fast.training.state.fused_adam import Averages
from diffratio_fast.training.state.generator import WATCHED, TrainState
from diffratio_fast.training.state.optimizers import set_rate
from diffratio_fast.training.state.posthoc_ema import kept_weights, kept_with_weights
from diffratio_fast.training.state.watch import Watch
from diffratio_fast.training.step.finite import FiniteCheck
from diffratio_fast.training.step.stepper import Batch, Stepper, learning_rate_factor


def generator_factor(config: TrainConfig, step: int) -> float:
    """Factor of warm-up and ramp for the generator's learning rate: 0 in the warm-up, then rising to 1."""
    warmup, ramp = config.warmup_and_ramp()
    since = step - warmup
    return 0.0 if since < 0 else min(1.0, (since + 1) / (ramp + 1))


class Iteration(Stepper):
    """The pure function (state, step, batches) -> state, for one configuration on a device per process."""

    SOURCE = "the log ratio of fakes"
    """Source of the score difference, for error messages."""

    state: TrainState

    def __init__(
        self,
        config: TrainConfig,
        scaling: Scaling,
        state: TrainState,
        device: torch.device,
        world: World = ALONE,
    ) -> None:
        super().__init__(config, scaling, state.step, device, world)
        self.config: TrainConfig = config
        self.state = state
        self.ratio_law, self.generator_law = config.noise_laws()
        self.divergence = DIVERGENCES[config.divergence]
        self.weight = WEIGHTS[config.weight]
        self.generator = self.in_precision(state.generator)
        self.ratio: RatioNetwork = self.in_precision(state.ratio)
        self.purposes = ops.SHARED_NOISE if config.ratio_shared_noise else ops.SEPARATE_NOISE
        self.loss_weight = loss_weight(config.ratio_loss_weight, self.ratio_law, SIGMA_DATA)
        # the fused operations include noise and mean loss: rolls, penalty and weights use autograd instead
        plain = (
            config.ratio_roll_probability == 0
            and config.ratio_gradient_penalty == 0
            and config.ratio_loss_weight == "uniform"
        )
        fits = isinstance(state.ratio, RatioMixer) and plain
        self.mixer = cast(RatioMixer, state.ratio) if fits else None
        self.mixer_dtype = torch.bfloat16 if config.precision == "bfloat16" else None
        # callables for training; evaluation calls the networks directly
        self.fakes_of = Parallel(state.generator, self.generator, world, config)
        self.loss_of = Parallel(state.ratio, self.online_loss, world, config)
        skip = config.on_nonfinite == "skip"
        self.checks = {
            "ratio": FiniteCheck("ratio", state.ratio, skip=skip, world=world),
            "generator": FiniteCheck("generator", state.generator, skip=skip, world=world),
        }
        self.watch = Watch(WATCHED, state.statistics, state.bad_steps)

    def trained(self) -> dict[str, nn.Module]:
        return {"generator": self.state.generator, self.config.row.label: self.state.ratio}

    def _augmented(self, index: Tensor, copies: int, *, substep: int, draws: int = 1) -> RatioNetwork:
        """The ratio network after this step's random rolls, the same for all ``copies`` of a sample."""
        probability, reach = self.config.ratio_roll_probability, self.config.ratio_roll_reach
        if probability == 0:
            return self.ratio
        shifts = torch.cat(
            [
                roll_shifts(self.rng, index, probability, reach, substep=substep, draw=draw)
                for draw in range(draws)
            ]
        ).repeat(copies, 1)
        return lambda noised, sigma, labels: self.ratio(roll(noised, shifts), sigma, labels)

    def _fakes(self, index: Tensor, labels: Tensor, substep: int) -> Tensor:
        latents = latents_for(self.state.generator, self.rng, index, ops.Purpose.LATENT, substep=substep)
        return (self.fakes_of if torch.is_grad_enabled() else self.generator)(latents, labels)

    def online_loss(
        self, real: Tensor, fake: Tensor, labels: Tensor, index: Tensor, substep: int
    ) -> RatioLoss:
        """Loss of the online network on clean images of a part of a batch; overridden by objectives."""
        sigma, _ = sample_sigma(self.ratio_law, self.rng, index, ops.Purpose.SIGMA_RATIO, substep=substep)
        level = sigma[:, 0].to(self.dtype)
        if self.config.ratio_matched_pairs:
            fake = fake[matched(real, fake, labels)]
        arguments = (real, fake, level, labels, self.rng, index)
        common: dict[str, Any] = {"substep": substep, "purposes": self.purposes}
        if self.mixer is not None:
            return fused.ratio_loss(self.mixer, *arguments, **common, dtype=self.mixer_dtype)
        uniform = self.config.ratio_loss_weight == "uniform"
        return diffratio.ratio_loss(
            self._augmented(index, 2, substep=substep), *arguments, **common,
            weight=None if uniform else self.loss_weight(level),
            gradient_penalty=self.config.ratio_gradient_penalty,
        )  # fmt: skip

    def _ratio_step(
        self, batch: Batch, substep: int, keep_graph: bool, averages: Averages
    ) -> tuple[Tensor, Tensor]:
        """One update of the ratio network; the last part's fakes (with their graph, if kept) and labels."""
        state = self.state
        self.loss_of.prepare()
        state.ratio_optimizer.zero_grad(set_to_none=True)
        values = torch.zeros(5, dtype=torch.float64, device=self.device)
        for part in self.parts:
            real, labels, index = self.part(batch, part, substep)
            with contextlib.nullcontext() if keep_graph else torch.no_grad():
                fake = self._fakes(index, labels, substep)
            # both halves of a pair share dropout masks and augmentation
            with (
                dropout_stream(state.ratio, self.rng, torch.cat((index, index)), substep=substep),
                self.loss_of.part(last=self.is_last(part)),
            ):
                outcome = self.loss_of(real, fake, labels, index, substep)
                (outcome.loss * self.share(index)).backward()
            values += self._metrics(outcome) * self.share(index)
        self.world.mean(values)
        if substep == 0:
            state.sums[:5] += values
            state.sums[6] += 1
        losses = {"the ratio loss": values[0]}
        self.update(self.checks["ratio"], losses, state.ratio_optimizer, averages)
        return fake, labels

    @staticmethod
    def _metrics(outcome: RatioLoss) -> Tensor:
        real_half, fake_half = outcome.log_ratio_real, outcome.log_ratio_fake
        values = (
            outcome.loss.detach(),
            (real_half > 0).double().mean(),
            (fake_half < 0).double().mean(),
            real_half.mean(),
            fake_half.mean(),
        )
        return torch.stack([value.double() for value in values])

    def generator_direction(
        self, fake: Tensor, labels: Tensor, index: Tensor
    ) -> tuple[ScoreDifference, Tensor | None]:
        """Gradient for each fake of a part; objectives override this method.

        With ``normalize_h`` also the noise-level bins of h, otherwise None.
        """
        config, state = self.config, self.state
        draws = config.noise_draws
        sigma, uniforms = sample_sigma(
            self.generator_law, self.rng, index, ops.Purpose.SIGMA_GENERATOR, draws=draws
        )
        sigma = sigma.to(self.dtype)
        bin_of = bins(uniforms) if config.normalize_h else None
        arguments = (fake, sigma, labels, self.rng, index)
        keywords: dict[str, Any] = {
            "weight": self.weight(sigma, SIGMA_DATA),
            "divergence": self.divergence,
            "h_mean": None if bin_of is None else state.h_means[bin_of],
        }
        if self.mixer is not None:
            outcome = fused.score_difference(self.mixer, *arguments, **keywords, dtype=self.mixer_dtype)
        else:
            # rolls of the generator step use a separate substep, after those of the ratio steps
            network = self._augmented(index, 1, substep=255, draws=draws)
            outcome = diffratio.score_difference(network, *arguments, **keywords)
        return outcome, bin_of

    def _generator_step(self, batch: Batch, whole: tuple[Tensor, Tensor] | None) -> None:
        """One update of the generator and its averages, from the batch's fakes where they were kept."""
        config, state = self.config, self.state
        if not self.loss_of.sharded:  # FSDP2 tracks which tensors require gradients
            state.ratio.requires_grad_(False)
        state.generator_optimizer.zero_grad(set_to_none=True)
        # means of clamped logits and of log ratios, and the input of the normalization of h
        means = torch.zeros(2, dtype=torch.float64, device=self.device)
        sums = torch.zeros(2, BINS, dtype=torch.float64, device=self.device)
        for part in self.parts:
            index = self.index[part]
            with self.fakes_of.part(last=self.is_last(part)):
                if whole is None:
                    labels = batch[1][part].to(self.device, non_blocking=True)
                    fake = self._fakes(index, labels, 0)  # the same images again, with a graph
                else:
                    fake, labels = whole
                outcome, bin_of = self.generator_direction(fake, labels, index)
                fake.backward(outcome.gradient.to(fake.dtype) / len(self.index))
            values = outcome.clamped.double().mean(), outcome.log_ratio.double().mean()
            means += torch.stack(values) * self.share(index)
            if bin_of is not None:
                sums += bin_sums(bin_of, outcome.h)
        state.ratio.requires_grad_(True)
        clamped, log_ratio = self.world.mean(means)
        if config.normalize_h:
            update_means(state.h_means, self.world.sum(sums))
        if self.divergence.clamp is not None:
            state.sums[5] += clamped
        averages = [(state.average, self.numbers["average"])]
        averages += kept_with_weights(config, state.kept, self.numbers)
        self.update(self.checks["generator"], {self.SOURCE: log_ratio}, state.generator_optimizer, averages)

    def settle(self, batch: Batch) -> None:
        state = self.state
        state.ratio.eval()
        state.generator.eval()
        real, labels, index = self.part(batch, self.parts[0])
        fake = self._fakes(index, labels, 0)
        loss = self.loss_of(real, fake, labels, index, 0).loss
        (loss * 0).backward()
        fake.backward(torch.zeros_like(fake))
        state.ratio_optimizer.zero_grad(set_to_none=True)
        state.generator_optimizer.zero_grad(set_to_none=True)

    def begin(self) -> bool:
        """See ``Stepper.begin``; the variant is whether the generator trains in this step."""
        config, state = self.config, self.state
        step = state.step
        self.rng[1].fill_(step)  # in place: a new tensor in each step would synchronize
        factor = learning_rate_factor(config, step)
        set_rate(state.ratio_optimizer, config.ratio_lr * factor)
        generator_share = generator_factor(config, step)
        set_rate(state.generator_optimizer, config.generator_lr * factor * generator_share)
        if state.ratio_average is not None and config.ratio_ema_half_life_images is not None:
            decay = ema_decay(
                step, config.batch_size, config.ratio_ema_half_life_images, config.ema_rampup_ratio
            )
            self.set("ratio_average", 1 - decay)
        update = step - config.warmup_and_ramp()[0]
        if update >= 0:
            self.set("average", 1 - average_decay(config, update, step))
            for name, weight in kept_weights(config, update).items():
                self.set(name, weight)
        return generator_share > 0

    def compute(self, batches: list[Batch], variant: Hashable) -> None:
        state, trains = self.state, bool(variant)
        state.ratio.train()
        state.generator.train()
        self.fakes_of.prepare()

        # one forward serves both steps: detached for the ratio, with its graph for the generator; unless the
        # batch comes in parts, of which only one graph may be in memory at a time
        keeps = trains and len(self.parts) == 1
        averages: Averages = ()
        if state.ratio_average is not None:
            averages = [(state.ratio_average, self.numbers["ratio_average"])]
        last = len(batches) - 1
        whole = self._ratio_step(batches[0], 0, keeps, averages if last == 0 else ())
        for substep, batch in enumerate(batches[1:], 1):
            self._ratio_step(batch, substep, False, averages if substep == last else ())
        if trains:
            state.ratio.eval()
            self._generator_step(batches[0], whole if keeps else None)
        ratio, generator = self.checks["ratio"], self.checks["generator"]
        self.watch.note([*ratio.latest, generator.gradient_norm] if trains else ratio.latest)
