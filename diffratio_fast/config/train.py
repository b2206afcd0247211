"""Options of ``train``: what each group adds to those of ``config.run``."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio_fast.config.noise_laws import NoiseLaw
from diffratio_fast.config.objectives import OBJECTIVES, Objective, check_objective
from diffratio_fast.config.options import Options, option
from diffratio_fast.config.run import (
    AugmentationOptions,
    NetworkOptions,
    OptimizationOptions,
    RunConfig,
    RunOptions,
)
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.errors import UserError

WEIGHT_NAMES = ("uniform", "sigma", "sigma2", "bounded", "dmd")
LOSS_WEIGHT_NAMES = ("uniform", "total_std")
INIT_WARMUP_STEPS = 500
"""Steps of the ratio network's warm-up, and then of the generator's ramp, if --init gives a generator."""


@dataclass(frozen=True)
class TrainRunOptions(RunOptions):
    refit_steps: int = option(
        200,
        "largest number of steps for which an evaluation refits a copy of the ratio network, to estimate the "
        "divergence; 0: no refit",
        low=0,
        free=True,
    )

    eval_features: str = option(
        "auto",
        "features in which evaluations compare images (auto: pixels of small images, else efficientnet-lite0 "
        "where it is installed, else random)",
        choices=("auto", "inception", "dinov2", "efficientnet-lite0", "pixels", "random", "none"),
        free=True,
    )
    vae: str | None = option(
        None,
        "data of latents: the AutoencoderKL that decodes them for evaluations (default: latents are "
        "compared)",
        free=True,
    )


@dataclass(frozen=True)
class TrainNetworkOptions(NetworkOptions):
    init_networks: str = option(
        "both", "which networks start from --init", choices=("both", "generator", "ratio")
    )
    teacher: str | None = option(
        None,
        "vsd: the frozen denoiser, a run of pretrain or converted weights (default: the denoiser of --init)",
    )
    generator: str = option(
        "mlp",
        "generator: mlp, or backbone: a denoising U-Net at one noise level",
        choices=("mlp", "backbone"),
    )
    generator_width: int = option(256, "mlp: features of the generator's hidden layers", low=1)
    generator_depth: int = option(3, "mlp: hidden layers of the generator", low=1)
    latent_size: int = option(64, "mlp: numbers in a latent", low=1)
    sigma_init: float = option(2.5, "backbone: the noise level at which the generator starts", above=0)
    ratio_network: str = option(
        "mlp",
        "ratio network: mlp, mixer, or encoder: half the backbone",
        choices=("mlp", "mixer", "encoder"),
    )
    ratio_width: int = option(256, "mlp, mixer: features of the hidden layers", low=1)
    ratio_depth: int = option(4, "mlp, mixer: residual layers of the ratio network", low=1)
    ratio_expansion: int = option(2, "mixer: hidden units per feature", low=1)
    ratio_patch: int | None = option(
        None, "mixer: pixels along a patch (default: from 2 on, at most 256 patches)", low=1
    )
    ratio_middle: bool = option(True, "encoder: with the backbone's two middle blocks")
    ratio_pool: str = option(
        "linear",
        "encoder: how its features are read: a map aware of positions, or attention",
        choices=("linear", "attention"),
    )
    ratio_head: str = option(
        "scalar",
        "the log ratio is a scalar f of the features, or (energy) f + <c_in x, F> / sqrt(D)",
        choices=("scalar", "energy"),
        before="scalar",
    )
    ratio_scaled_logit: bool = option(
        False, "mlp, encoder: multiply the log ratio by sigma_data / sqrt(sigma^2 + sigma_data^2)"
    )
    ratio_dropout: float = option(0.0, "encoder: dropout while the ratio network trains", low=0, high=0.99)


@dataclass(frozen=True)
class TrainOptimizationOptions(OptimizationOptions):
    generator_lr: float = option(1e-3, "learning rate of the generator", low=0)
    ratio_lr: float = option(2e-3, "learning rate of the ratio network", low=0)
    generator_weight_decay: float = option(0.0, "weight decay of the generator", low=0)
    ratio_weight_decay: float = option(
        0.0, "weight decay of the ratio network: against overfitting of small data", low=0
    )
    ratio_ema_half_life_images: float | None = option(
        None, "half-life of a moving average of the ratio network, in images; none: keep none", above=0
    )


@dataclass(frozen=True)
class ObjectiveOptions(Options, group="objective"):
    objective: str = option(
        "diffratio",
        "how the generator is trained: by a ratio network; as a GAN; or by denoisers of --backbone, a "
        "teacher and a student (vsd) or one of real and generated images (conditional), to which the options "
        "ratio-lr, -noise, -steps and -warmup-steps then belong",
        choices=OBJECTIVES,
    )
    vsd_normalize: bool = option(
        False, "vsd: divide an image's gradient by its distance to the teacher's, as DMD does"
    )
    stable_targets: bool = option(
        False,
        "vsd, conditional: denoise to the posterior mean of the pass's images of a class; depends on "
        "--micro-batch and the number of processes",
    )
    conditional_rate: float = option(
        10.0, "conditional: learning rate of the read-out of tau, as a multiple of --ratio-lr", above=0
    )
    divergence: str = option(
        "reverse_kl", "divergence that the generator descends", choices=tuple(DIVERGENCES)
    )
    weight: str = option("bounded", "weight w(sigma) of the generator's gradient", choices=WEIGHT_NAMES)
    ratio_noise: str = option("loguniform(0.07, 1.3)", "law of sigma for the ratio network")
    generator_noise: str | None = option(
        None, "law of sigma for the generator (default: the ratio network's)"
    )
    noise_draws: int = option(1, "noise levels per image in a generator step", low=1, high=2**16 - 1)
    ratio_shared_noise: bool = option(
        True, "the real and the generated image of a pair get the same noise", before=False
    )
    ratio_matched_pairs: bool = option(
        False,
        "permute the generated images of a class, so that those of a pair are near one another; depends on "
        "--micro-batch and the number of processes",
        before=False,
    )
    ratio_loss_weight: str = option(
        "uniform", "weight of a noise level in the ratio network's loss", choices=LOSS_WEIGHT_NAMES
    )
    ratio_steps: int = option(1, "ratio-network updates per generator update", low=1, high=255)
    ratio_warmup_steps: int | None = option(
        None,
        f"first steps, in which only the ratio network trains (default: 0, with --init {INIT_WARMUP_STEPS})",
        low=0,
    )
    generator_ramp_steps: int | None = option(
        None,
        "steps over which the generator's learning rate then rises "
        f"(default: 0, with --init {INIT_WARMUP_STEPS})",
        low=0,
    )
    ratio_gradient_penalty: float = option(
        0.0, "weight of a penalty on the ratio network's slope, (sigma |grad l|)^2 by a finite difference",
        low=0,
    )  # fmt: skip
    normalize_h: bool = option(
        False, "divide the divergence's factor h by its running mean per noise-level bin"
    )


@dataclass(frozen=True)
class TrainAugmentationOptions(AugmentationOptions):
    ratio_roll_probability: float = option(
        0.0, "cyclic shifts of the ratio network's input, the same for real and fake", low=0, high=1
    )
    ratio_roll_reach: int = option(1, "largest such shift, in pixels", low=1)


@dataclass(frozen=True)
class TrainConfig(
    TrainAugmentationOptions,
    ObjectiveOptions,
    TrainOptimizationOptions,
    TrainNetworkOptions,
    TrainRunOptions,
    RunConfig,
):
    """All options of the training of a one-step generator."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # An untrained ratio network must not move a pre-trained generator: Adam turns tiny noisy gradients
        # into steps of full size.
        for name in ("ratio_warmup_steps", "generator_ramp_steps"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, 0 if self.init is None else INIT_WARMUP_STEPS)
        u_net = self.generator == "backbone" or self.ratio_network == "encoder" or not self.row.has_ratio
        if (given := self.given_sizes()) and not u_net:
            raise UserError(
                f"{given[0]} is the size of a U-Net, and this run has none: add --generator backbone or "
                "--ratio-network encoder (the mlp networks have --generator-width and --ratio-width)"
            )
        check_objective(self)
        if self.ratio_network == "mixer" and self.ratio_scaled_logit:
            raise UserError("--ratio-scaled-logit does not apply to --ratio-network mixer; omit one of them")
        self.noise_laws()

    @property
    def row(self) -> Objective:
        """The objective's row of the table."""
        return OBJECTIVES[self.objective]

    @property
    def batches_per_step(self) -> int:
        return self.ratio_steps

    @property
    def settled_step(self) -> int:
        return sum(self.warmup_and_ramp())

    def networks_text(self) -> dict[str, str]:
        ratio = self.ratio_network if self.row.has_ratio else self.backbone
        texts = {"generator": self.generator, self.row.label: ratio}
        for name, text in texts.items():
            if text in ("backbone", "encoder"):
                texts[name] = f"{text} of {self.backbone}"
        if self.row.has_teacher:
            texts[self.row.label] += ", and as large a teacher"
        return texts

    def objective_text(self) -> str:
        return self.row.title.format(**vars(self))

    def noise_laws(self) -> tuple[NoiseLaw, NoiseLaw]:
        """The ratio's and the generator's law of sigma; the generator's lies inside the ratio's support."""
        ratio = self.noise_law("ratio_noise")
        generator = ratio if self.generator_noise is None else self.noise_law("generator_noise")
        if not ratio.covers(generator):
            raise UserError(
                f"--generator-noise {generator.name} reaches outside --ratio-noise {ratio.name}, where the "
                "ratio is not trained; choose a narrower law, or a wider one for the ratio"
            )
        return ratio, generator

    def warmup_and_ramp(self) -> tuple[int, int]:
        """Steps of the ratio network's warm-up and of the generator's ramp after it."""
        return self.ratio_warmup_steps or 0, self.generator_ramp_steps or 0
