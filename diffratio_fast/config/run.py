"""Options that ``train`` and ``pretrain`` share, a dataclass per group."""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from diffratio_fast.config.noise_laws import NoiseLaw, parse_noise_law
from diffratio_fast.config.options import Options, flag, option
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import parse_json

LARGEST_WIDTH = 0.28
"""Largest relative width of a power-function average: equal weights have 0.29."""


@dataclass(frozen=True)
class RunOptions(Options, group="the run"):
    run_dir: str | None = option(None, "directory of the run (default: from the preset)", free=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", free=True)
    threads: int | None = option(
        None,
        "CPU threads (default: torch's choice); results are bit-identical only at equal thread counts",
        low=1,
        free=True,
    )
    seed: int = option(0, "seed of all randomness", low=0, high=2**63 - 1)
    steps: int = option(8000, "training steps", low=1, high=2**32 - 1, free=True)
    log_every: int = option(100, "steps between lines of metrics.jsonl", low=1, free=True)
    logger: str = option(
        "tensorboard",
        "where metrics go beside metrics.jsonl: tensorboard, csv, wandb, with commas between, or none",
        free=True,
    )
    eval_every: int = option(
        1000, "steps between evaluations on the validation split and sample grids", low=1, free=True
    )
    eval_images: int | None = option(
        None,
        "largest number of images that an evaluation generates and reads of each split (default: 10,000 and "
        "512; on a CPU fewer in a short run)",
        low=16,
        free=True,
    )
    checkpoint_every: int = option(1000, "steps between checkpoints", low=1, free=True)
    checkpoint_minutes: float | None = option(
        None, "also save a checkpoint so many minutes after the last (default: by steps alone)", above=0,
        free=True,
    )  # fmt: skip
    keep_checkpoints: int = option(2, "newest checkpoints to keep", low=1, free=True)
    keep_every_images: int | None = option(
        None, "also keep the first checkpoint of every so many images, to go back to", low=1, free=True
    )
    keep_best: bool = option(
        False, "also save and keep the checkpoint of the best evaluation on the validation split", free=True
    )
    on_save_failure: str = option(
        "continue",
        "what to do if a checkpoint cannot be written (full disk): continue or stop; the last one is kept",
        choices=("continue", "stop"),
        free=True,
    )
    snapshot_every: int = option(4000, "steps between snapshots of the average", low=1, free=True)
    on_nonfinite: str = option(
        "stop",
        "what to do if a gradient has NaN or Inf: stop the run, or skip the update (and report it)",
        choices=("stop", "skip"),
        free=True,
    )
    hang_timeout: float = option(
        300.0,
        "several processes: seconds after which one that died, stopped or hangs ends the run; it is named",
        above=0,
        free=True,
    )
    stop_after_bad_steps: int | None = option(
        None,
        "stop the run after this many steps in a row with a loss or gradient that was not finite, or jumped "
        "far above its mean (checked with the next log line; default: never)",
        low=1,
        free=True,
    )


@dataclass(frozen=True)
class DataOptions(Options, group="data"):
    data: str = option("digits", "data set: digits, or the directory of a prepared one")
    loader: str = option(
        "native",
        "how prepared data are read; the batches are the same",
        choices=("native", "dali"),
        free=True,
    )
    verify: str = option(
        "first_epoch",
        "which records of prepared data are hashed while read",
        choices=("always", "first_epoch", "never"),
        free=True,
    )
    class_conditional: bool = option(True, "condition the networks on an image's class, if data have classes")


U_NET_SIZES = {
    "width": "model_channels",
    "depth": "num_blocks",
    "channel_mult": "channel_mult",
    "attention": "attn_resolutions",
}
"""Options that each set one option of the published constructor."""


def _whole_numbers(name: str, text: str) -> list[int]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(
            f"{flag(name)} {text}: not a list of integers; expected integers above 0, separated by commas"
        )
    return [int(word) for word in words]


@dataclass(frozen=True)
class NetworkOptions(Options, group="networks"):
    init: str | None = option(
        None, "start from a run of train or pretrain, a generator.safetensors, or converted published weights"
    )
    backbone: str = option("edm:ddpmpp", "published U-Net: edm:ddpmpp, edm:adm, edm2:xs, ...")
    width: int | None = option(None, "U-Nets: channels at full resolution (default: the preset's)", low=1)
    depth: int | None = option(
        None, "U-Nets: residual layers at each resolution (default: the preset's)", low=1
    )
    channel_mult: str | None = option(
        None, "U-Nets: multiples of the width at each resolution, such as 1,2,2 (default: the preset's)"
    )
    attention: str | None = option(
        None, "U-Nets: resolutions with self-attention, such as 16,8 (default: the preset's)"
    )
    backbone_options: str = option(
        "{}", "all options of the published constructor, as a JSON object; the four above override them"
    )

    @property
    def backbone_arguments(self) -> dict[str, Any]:
        """``backbone_options``, overridden by width, depth, channel_mult and attention."""
        try:
            arguments = parse_json(self.backbone_options)
        except ValueError as error:
            raise UserError(
                f"--backbone-options is not JSON ({error}): {reprlib.repr(self.backbone_options)}"
            ) from None
        if not isinstance(arguments, dict):
            raise UserError(
                f"--backbone-options must be a JSON object, not {reprlib.repr(self.backbone_options)}"
            )
        for name, published in U_NET_SIZES.items():
            value = getattr(self, name)
            if value is not None:
                arguments[published] = _whole_numbers(name, value) if isinstance(value, str) else value
        return arguments

    def given_sizes(self) -> list[str]:
        """The options among ``U_NET_SIZES`` that are set, as they are typed."""
        return [flag(name) for name in U_NET_SIZES if getattr(self, name) is not None]


@dataclass(frozen=True)
class OptimizationOptions(Options, group="optimization"):
    batch_size: int = option(128, "images per step", low=1)
    micro_batch: int | None = option(
        None, "images in one pass of one process; gradients of several passes add up (default: all)",
        low=1, free=True,
    )  # fmt: skip
    parallel: str = option(
        "ddp",
        "several processes: each has complete networks (ddp), or a part of each weight (fsdp: FSDP2)",
        choices=("ddp", "fsdp"),
        free=True,
    )
    reduce_dtype: str = option(
        "float32",
        "several processes: dtype in which gradients are averaged (float32: the run's own precision)",
        choices=("float32", "bfloat16"),
    )
    optimizer: str = option(
        "adamw",
        "adamw or adam of PyTorch (fused), or NVIDIA apex's FusedAdam",
        choices=("adamw", "adam", "apex"),
    )
    lr_schedule: str = option(
        "constant",
        "learning rates over the run: constant, falling to lr_final, or by 1/sqrt after lr_decay_steps",
        choices=("constant", "linear", "cosine", "inverse_sqrt"),
    )
    lr_final: float = option(
        0.0, "share of the learning rates left at the end of a linear or cosine schedule", low=0, high=1
    )
    lr_decay_steps: int = option(70_000, "inverse_sqrt: the step from which learning rates fall", low=1)
    lr_warmup_steps: int = option(0, "steps over which all learning rates rise at the start", low=0)
    beta1: float = option(0.0, "Adam's first-moment decay", low=0, high=0.99999)
    beta2: float = option(0.99, "Adam's second-moment decay", low=0, high=0.999999)
    ema_half_life_images: float = option(44_000.0, "half-life of the moving average, in images", low=0)
    ema_rampup_ratio: float | None = option(
        0.1, "the half-life is at most this share of the images seen; none: no ramp", above=0
    )
    ema_std: float | None = option(
        None,
        "relative width of EDM2's power-function average, in place of the half-life",
        above=0,
        high=LARGEST_WIDTH,
    )
    posthoc_ema: str | None = option(
        None,
        "relative widths of power-function averages to keep with every snapshot (0.05,0.10); "
        "python -m diffratio_fast.average makes one of any width from them",
    )
    posthoc_ema_half: bool = option(False, "keep those in float16: half the disk", free=True)
    precision: str = option(
        "float32",
        "float32, float64, or bfloat16 autocast of the networks",
        choices=("float32", "bfloat16", "float64"),
    )
    compile: bool = option(False, "compile the networks with torch.compile")
    capture: bool = option(
        False,
        "a GPU: replay the whole step as a CUDA graph, so that nothing waits for Python (the same numbers)",
        free=True,
    )
    channels_last: bool = option(False, "keep images with their channels innermost", free=True)
    fused: str = option(
        "auto",
        "EDM2 networks: the fused operations where they exist (auto), or plain PyTorch (off)",
        choices=("auto", "off"),
        free=True,
    )
    activation_checkpointing: bool = option(
        False, "compute U-Net blocks twice to keep fewer activations", free=True
    )

    @property
    def posthoc_widths(self) -> tuple[float, ...]:
        """The widths of ``posthoc_ema`` in ascending order; empty without it."""
        return () if self.posthoc_ema is None else _widths(self.posthoc_ema)


@lru_cache
def _widths(text: str) -> tuple[float, ...]:
    try:
        widths = tuple(sorted({float(part) for part in text.split(",")}))
    except ValueError:
        widths = ()
    if not widths or not all(0 < width <= LARGEST_WIDTH for width in widths):
        raise UserError(
            f"--posthoc-ema must be relative widths above 0 and up to {LARGEST_WIDTH}, separated by commas "
            f"(0.05,0.10), not {text}"
        )
    return widths


@dataclass(frozen=True)
class AugmentationOptions(Options, group="augmentation"):
    flip_probability: float = option(0.0, "horizontal flips of the data", low=0, high=1)


@dataclass(frozen=True)
class RunConfig(AugmentationOptions, OptimizationOptions, NetworkOptions, DataOptions, RunOptions):
    """Configuration of a run of any kind; ``free`` fields do not alter the training of a step.

    A dataclass lists the fields of its last base first: the groups are in the order of ``--help``.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.backbone_arguments, self.posthoc_widths  # noqa: B018  # raise where the text is wrong

    @property
    def batches_per_step(self) -> int:
        """Number of batches per training step."""
        return 1

    @property
    def settled_step(self) -> int:
        """The step from which all networks train at their full rate."""
        return 0

    def networks_text(self) -> dict[str, str]:
        """Architecture of each trained network, as text for a plan."""
        raise NotImplementedError

    def objective_text(self) -> str:
        """The objective, as text for a plan."""
        raise NotImplementedError

    def noise_law(self, name: str) -> NoiseLaw:
        """The noise law in the field ``name``."""
        try:
            return parse_noise_law(getattr(self, name))
        except UserError as error:
            raise UserError(f"{flag(name)}: {error}") from None
