"""The configurations of training and pre-training runs, from which options, YAML and checks all derive."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffratio_fast.command import UserError
from diffratio_fast.options import GROUPS, Options, add_options, changed_fields, option, read_yaml

__all__ = [
    "GROUPS",
    "PretrainConfig",
    "RunConfig",
    "TrainConfig",
    "add_options",
    "changed_fields",
    "read_config",
]

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
class RunConfig(Options):
    """What every command that trains understands; ``free`` fields do not alter the training of a step."""

    run_dir: str | None = option(None, "where the run lives (default: from the preset)", "run", free=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", "run", free=True)
    threads: int | None = option(
        None,
        "CPU threads (default: torch's choice); results are bit-identical only at equal thread counts",
        "run",
        low=1,
        free=True,
    )
    seed: int = option(0, "seed of all randomness", "run", low=0, high=2**63 - 1)
    steps: int = option(8000, "training steps", "run", low=1, high=2**32 - 1, free=True)
    log_every: int = option(100, "steps between lines of metrics.jsonl", "run", low=1, free=True)
    eval_every: int = option(
        1000, "steps between evaluations on the validation split and sample grids", "run", low=1, free=True
    )
    eval_images: int | None = option(
        None,
        "images that an evaluation generates, and looks at of each split, at most (default: 10,000 and 512; "
        "on a CPU fewer in a short run)",
        "run",
        low=16,
        free=True,
    )
    checkpoint_every: int = option(1000, "steps between checkpoints", "run", low=1, free=True)
    on_save_failure: str = option(
        "continue",
        "what a checkpoint that cannot be written (full disk) does: continue or stop; the last one is kept",
        "run",
        choices=("continue", "stop"),
        free=True,
    )
    snapshot_every: int = option(4000, "steps between snapshots of the average", "run", low=1, free=True)
    on_nonfinite: str = option(
        "stop",
        "what a NaN or Inf in a gradient does: stop the run, or skip the update (and report it)",
        "run",
        choices=("stop", "skip"),
        free=True,
    )
    hang_timeout: float = option(
        300.0,
        "several processes: seconds after which one that died, was stopped or hangs ends the run, by name",
        "run",
        above=0,
        free=True,
    )
    stop_after_bad_steps: int | None = option(
        None,
        "stop the run after so many steps in a row whose loss or gradient was not finite, or jumped far "
        "above its mean (noticed with the next log line; default: never)",
        "run",
        low=1,
        free=True,
    )

    data: str = option("digits", "data set: digits, or the directory of a prepared one", "data")
    loader: str = option(
        "native",
        "how prepared data are read; the batches are the same",
        "data",
        choices=("native", "dali"),
        free=True,
    )
    verify: str = option(
        "first_epoch",
        "which records of prepared data are hashed while read",
        "data",
        choices=("always", "first_epoch", "never"),
        free=True,
    )
    class_conditional: bool = option(True, "tell the networks an image's class, if data have any", "data")

    init: str | None = option(
        None,
        "start from a run of train or pretrain, a generator.safetensors, or converted published weights",
        "networks",
    )
    backbone: str = option("edm:ddpmpp", "published U-Net: edm:ddpmpp, edm:adm, edm2:xs, ...", "networks")
    backbone_options: str = option("{}", "its published constructor's options, as a JSON object", "networks")

    batch_size: int = option(128, "images per step", "optimization", low=1)
    micro_batch: int | None = option(
        None, "images in one pass (of one process); gradients of several passes add up (default: all)",
        "optimization", low=1, free=True,
    )  # fmt: skip
    parallel: str = option(
        "ddp",
        "several processes: each has the whole networks (ddp), or a part of each weight (fsdp: FSDP2)",
        "optimization",
        choices=("ddp", "fsdp"),
        free=True,
    )
    reduce_dtype: str = option(
        "float32",
        "several processes: what gradients are averaged in (float32: the run's own precision)",
        "optimization",
        choices=("float32", "bfloat16"),
    )
    optimizer: str = option(
        "adamw",
        "adamw or adam of PyTorch (fused), or NVIDIA apex's FusedAdam",
        "optimization",
        choices=("adamw", "adam", "apex"),
    )
    lr_schedule: str = option(
        "constant",
        "learning rates over the run: constant, falling to lr_final, or by 1/sqrt after lr_decay_steps",
        "optimization",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    )
    lr_final: float = option(
        0.0,
        "share of the learning rates left at the end of a linear or cosine schedule",
        "optimization",
        low=0,
        high=1,
    )
    lr_decay_steps: int = option(
        70_000, "inverse_sqrt: the step from which learning rates fall", "optimization", low=1
    )
    lr_warmup_steps: int = option(
        0, "steps over which all learning rates rise at the start", "optimization", low=0
    )
    beta1: float = option(0.0, "Adam's first-moment decay", "optimization", low=0, high=0.99999)
    beta2: float = option(0.99, "Adam's second-moment decay", "optimization", low=0, high=0.999999)
    ema_half_life_images: float = option(
        44_000.0, "half-life of the moving average, in images", "optimization", low=0
    )
    ema_rampup_ratio: float | None = option(
        0.1, "the half-life is at most this share of the images seen; none: no ramp", "optimization", above=0
    )
    ema_std: float | None = option(
        None,
        "EDM2's power-function average of this relative width, in place of the half-life",
        "optimization",
        above=0,
        high=0.28,
    )
    posthoc_ema: str | None = option(
        None,
        "relative widths of power-function averages to keep with every snapshot (0.05,0.10), of which "
        "python -m diffratio_fast.average makes one of any width afterwards",
        "optimization",
    )
    posthoc_ema_half: bool = option(False, "keep those in float16: half the disk", "optimization", free=True)
    precision: str = option(
        "float32",
        "float32, float64, or bfloat16 autocast of the networks",
        "optimization",
        choices=("float32", "bfloat16", "float64"),
    )
    compile: bool = option(False, "compile the networks with torch.compile", "optimization")
    capture: bool = option(
        False,
        "a GPU: replay the whole step as a CUDA graph, so that nothing waits for Python (the same numbers)",
        "optimization",
        free=True,
    )
    channels_last: bool = option(
        False, "keep images with their channels innermost", "optimization", free=True
    )
    activation_checkpointing: bool = option(
        False, "compute U-Net blocks twice to keep fewer activations", "optimization", free=True
    )

    flip_probability: float = option(0.0, "horizontal flips of the data", "augmentation", low=0, high=1)


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


@dataclass(frozen=True)
class PretrainConfig(RunConfig):
    """Everything that decides the pre-training of a denoiser."""

    dropout: float = option(0.0, "dropout of the denoiser's blocks", "networks", low=0, high=0.99)
    lr: float = option(1e-3, "learning rate", "optimization", low=0)
    weight_decay: float = option(0.0, "weight decay", "optimization", low=0)
    noise: str = option("lognormal(-1.2, 1.2)", "law of sigma", "objective")
    augment_probability: float = option(
        0.0,
        "of each of EDM's geometric transforms, of which the denoiser is told; above 0, every other image is "
        "mirrored too",
        "augmentation",
        low=0,
        high=1,
    )


def read_config(path: Path, kind: type[Options] = TrainConfig) -> dict[str, Any]:
    """See ``options.read_yaml``."""
    return read_yaml(kind, path)
