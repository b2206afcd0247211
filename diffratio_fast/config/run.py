"""Options that every command that trains has."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio_fast.config.options import Options, option


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
