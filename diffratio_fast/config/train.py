"""Options of ``train``."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio_fast.config.options import option
from diffratio_fast.config.run import RunConfig
from diffratio_fast.errors import UserError

DIVERGENCE_NAMES = (
    "reverse_kl",
    "jensen_shannon",
    "softened_reverse_kl",
    "forward_kl",
    "squared_hellinger",
    "jeffreys",
)
OBJECTIVE_NAMES = ("diffratio", "vsd")
WEIGHT_NAMES = ("uniform", "sigma", "sigma2", "bounded", "dmd")
INIT_WARMUP_STEPS = 500
"""Steps of the ratio network's warm-up, and then of the generator's ramp, where --init gives a generator."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Everything that decides the training of a one-step generator.

    With the objective "vsd" the student stands in the ratio network's place: the options ``ratio_lr``,
    ``ratio_weight_decay``, ``ratio_noise``, ``ratio_steps`` and ``ratio_warmup_steps`` are its own.
    """

    refit_steps: int = option(
        200,
        "steps at most for which an evaluation refits a copy of the ratio network to tell the divergence; "
        "0: none",
        "run",
        low=0,
        free=True,
    )

    init_networks: str = option(
        "both",
        "which networks start from --init",
        "networks",
        choices=("both", "generator", "ratio"),
    )
    teacher: str | None = option(
        None,
        "vsd: the frozen denoiser, a run of pretrain or converted weights (default: what --init names)",
        "networks",
    )
    generator: str = option(
        "mlp",
        "generator: mlp, or backbone: a denoising U-Net at one noise level",
        "networks",
        choices=("mlp", "backbone"),
    )
    generator_width: int = option(256, "mlp: features of the generator's hidden layers", "networks", low=1)
    generator_depth: int = option(3, "mlp: hidden layers of the generator", "networks", low=1)
    latent_size: int = option(64, "mlp: numbers in a latent", "networks", low=1)
    sigma_init: float = option(
        2.5, "backbone: the noise level at which the generator starts", "networks", above=0
    )
    ratio_network: str = option(
        "mlp",
        "ratio network: mlp, mixer, or encoder: half the backbone",
        "networks",
        choices=("mlp", "mixer", "encoder"),
    )
    ratio_width: int = option(256, "mlp, mixer: features of the hidden layers", "networks", low=1)
    ratio_depth: int = option(4, "mlp, mixer: blocks of the ratio network", "networks", low=1)
    ratio_expansion: int = option(2, "mixer: hidden units per feature", "networks", low=1)
    ratio_patch: int | None = option(
        None, "mixer: pixels along a patch (default: from 2 on, at most 256 patches)", "networks", low=1
    )
    ratio_middle: bool = option(True, "encoder: with the backbone's two middle blocks", "networks")
    ratio_pool: str = option(
        "linear",
        "encoder: how its features are read: a map aware of positions, or attention",
        "networks",
        choices=("linear", "attention"),
    )
    ratio_dropout: float = option(
        0.0, "encoder: dropout while the ratio network learns", "networks", low=0, high=0.99
    )

    generator_lr: float = option(1e-3, "learning rate of the generator", "optimization", low=0)
    ratio_lr: float = option(2e-3, "learning rate of the ratio network", "optimization", low=0)
    generator_weight_decay: float = option(0.0, "weight decay of the generator", "optimization", low=0)
    ratio_weight_decay: float = option(
        0.0, "weight decay of the ratio network: an option that small data need", "optimization", low=0
    )

    ratio_ema_half_life_images: float | None = option(
        None,
        "half-life of a moving average of the ratio network, in images; none: keep none",
        "optimization",
        above=0,
    )

    objective: str = option(
        "diffratio",
        "how the generator learns: from a ratio network, or (vsd) from a teacher and a student denoiser, of "
        "--backbone; options of the ratio network are then the student's",
        "objective",
        choices=OBJECTIVE_NAMES,
    )
    vsd_normalize: bool = option(
        False, "vsd: divide an image's gradient by its distance to the teacher's, as DMD does", "objective"
    )
    divergence: str = option(
        "reverse_kl", "divergence that the generator descends", "objective", choices=DIVERGENCE_NAMES
    )
    weight: str = option(
        "bounded", "weight w(sigma) of the generator's gradient", "objective", choices=WEIGHT_NAMES
    )
    ratio_noise: str = option("loguniform(0.07, 1.3)", "law of sigma for the ratio network", "objective")
    generator_noise: str | None = option(
        None, "law of sigma for the generator (default: the ratio network's)", "objective"
    )
    noise_draws: int = option(
        1, "noise levels per image in a generator step", "objective", low=1, high=2**16 - 1
    )
    ratio_steps: int = option(1, "ratio-network updates per generator update", "objective", low=1, high=255)
    ratio_warmup_steps: int | None = option(
        None,
        f"first steps, in which only the ratio network learns (default: 0, with --init {INIT_WARMUP_STEPS})",
        "objective",
        low=0,
    )
    generator_ramp_steps: int | None = option(
        None,
        "steps over which the generator's learning rate then rises "
        f"(default: 0, with --init {INIT_WARMUP_STEPS})",
        "objective",
        low=0,
    )
    ratio_gradient_penalty: float = option(
        0.0,
        "weight of a penalty on the ratio network's slope, (sigma |grad l|)^2 by a finite difference",
        "objective",
        low=0,
    )
    normalize_h: bool = option(
        False, "divide the divergence's factor h by its running mean per noise-level bin", "objective"
    )

    ratio_roll_probability: float = option(
        0.0,
        "cyclic shifts of the ratio network's input, the same for real and fake",
        "augmentation",
        low=0,
        high=1,
    )
    ratio_roll_reach: int = option(1, "largest such shift, in pixels", "augmentation", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        # A pre-trained generator must not be moved by a ratio network that knows nothing yet: Adam turns tiny
        # noisy gradients into steps of full size.
        for name in ("ratio_warmup_steps", "generator_ramp_steps"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, 0 if self.init is None else INIT_WARMUP_STEPS)
        if self.objective == "vsd":
            self._check_vsd()
        elif self.teacher is not None or self.vsd_normalize:
            raise UserError(
                f"{'teacher' if self.teacher else 'vsd_normalize'} is an option of --objective vsd alone"
            )

    def _check_vsd(self) -> None:
        """Refuse what score distillation does not know."""
        if self.teacher is None and self.init is None:
            raise UserError("--objective vsd needs a denoiser to learn from: --teacher RUN, or --init RUN")
        plain = {
            "divergence": "reverse_kl",
            "normalize_h": False,
            "ratio_roll_probability": 0.0,
            "ratio_gradient_penalty": 0.0,
            "ratio_ema_half_life_images": None,
        }
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"--objective vsd knows {name} {'none' if value is None else value} alone, not "
                    f"{getattr(self, name)}"
                )

    def warmup_and_ramp(self) -> tuple[int, int]:
        """Steps of the ratio network's warm-up and of the generator's ramp after it."""
        return self.ratio_warmup_steps or 0, self.generator_ramp_steps or 0
