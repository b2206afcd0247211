"""Named configurations: differences from the defaults. docs/presets.md lists the sources of the numbers.

A preset has up to three parts: what ``train`` and ``pretrain`` share (data and backbone), and what each adds.
"""

from __future__ import annotations

import json
from typing import Any

DEFAULT = "digits"

Values = dict[str, Any]

_DIGITS_TRAIN: Values = {
    "data": "digits",
    "threads": 1,
    "steps": 4000,
    "eval_every": 500,
    "checkpoint_every": 500,
    "batch_size": 128,
    "generator_width": 256,
    "generator_depth": 3,
    "latent_size": 64,
    "ratio_width": 192,
    "ratio_depth": 4,
    "generator_lr": 1e-3,
    "ratio_lr": 2e-3,
    "ratio_weight_decay": 0.3,
    "lr_schedule": "cosine",
    "lr_final": 0.2,
    "lr_warmup_steps": 100,
    "ema_half_life_images": 59_000.0,
    "ratio_ema_half_life_images": 59_000.0,
    "divergence": "jensen_shannon",
    "weight": "sigma2",
    "ratio_noise": "loguniform(0.04, 1.33)",
}


def _backbone(name: str, **options: Any) -> Values:
    return {"backbone": name, "backbone_options": json.dumps(options)}


_DIGITS = {
    "data": "digits",
    **_backbone("edm:ddpmpp", model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4]),
}
_FASHION = {
    "data": "data/fashion-mnist",
    **_backbone("edm:ddpmpp", model_channels=16, channel_mult=[1, 2, 4], num_blocks=1, attn_resolutions=[7]),
}
_SMALL = _backbone(
    "edm:ddpmpp", model_channels=64, channel_mult=[1, 2, 2], num_blocks=1, attn_resolutions=[16]
)
_CIFAR10_SMALL = {"data": "data/cifar10", "flip_probability": 0.5, "channels_last": True, **_SMALL}
_FOLDER = {
    "data": "data/mine",
    "flip_probability": 0.5,
    "channels_last": True,
    **_backbone(
        "edm:ddpmpp", model_channels=32, channel_mult=[1, 2, 2, 2], num_blocks=1, attn_resolutions=[16]
    ),
}
_CIFAR10 = {
    "data": "data/cifar10",
    "flip_probability": 0.5,
    "precision": "bfloat16",
    "channels_last": True,
    **_backbone("edm:ddpmpp", model_channels=128, channel_mult=[2, 2, 2]),
}
_IMAGENET64 = {
    "data": "data/imagenet64",
    "precision": "bfloat16",
    "channels_last": True,
    **_backbone("edm:adm", model_channels=192, channel_mult=[1, 2, 3, 4]),
}
_IMAGENET512 = {"data": "data/imagenet512", "precision": "bfloat16", "channels_last": True}

_BACKBONE: Values = {  # common to all presets with published backbones
    "generator": "backbone",
    "ratio_network": "encoder",
    "optimizer": "adam",
    "beta1": 0.0,
    "beta2": 0.999,
    "sigma_init": 2.5,
    "divergence": "reverse_kl",
    "weight": "bounded",
    "ratio_noise": "karras(0.02, 80)",
    "log_every": 50,
    "eval_every": 2500,
    "checkpoint_every": 1000,
    "snapshot_every": 5000,
}
_SMALL_TRAIN: Values = {  # from scratch, as the preset fashion
    "generator": "backbone",
    "ratio_network": "encoder",
    "steps": 25_000,
    "batch_size": 128,
    "log_every": 50,
    "eval_every": 1000,
    "checkpoint_every": 500,
    "snapshot_every": 5000,
    "sigma_init": 2.5,
    "generator_lr": 2e-4,
    "ratio_lr": 5e-4,
    "beta1": 0.0,
    "beta2": 0.99,
    "lr_schedule": "cosine",
    "lr_final": 0.1,
    "ratio_weight_decay": 0.01,
    "ratio_dropout": 0.1,
    "ratio_warmup_steps": 200,
    "generator_ramp_steps": 200,
    "ema_half_life_images": 50_000.0,
    "divergence": "jensen_shannon",
    "weight": "bounded",
    "ratio_noise": "loguniform(0.05, 10)",
}
_SMALL_PRETRAIN: Values = {
    "steps": 25_000,
    "batch_size": 128,
    "log_every": 50,
    "eval_every": 1000,
    "checkpoint_every": 500,
    "snapshot_every": 5000,
    "lr": 1e-3,
    "lr_schedule": "cosine",
    "lr_warmup_steps": 500,
    "dropout": 0.1,
    "beta1": 0.9,
    "beta2": 0.99,
    "ema_half_life_images": 100_000.0,
    "noise": "lognormal(-1.2, 1.2)",
}
_CIFAR10_TRAIN: Values = _BACKBONE | {
    "steps": 100_000,
    "batch_size": 256,
    "generator_lr": 1e-5,
    "ratio_lr": 5e-5,
    "ratio_dropout": 0.13,
    "ema_half_life_images": 500_000.0,
    "ema_rampup_ratio": 0.05,
}
_IMAGENET64_TRAIN: Values = _BACKBONE | {
    "steps": 200_000,
    "batch_size": 512,
    "micro_batch": 64,
    "generator_lr": 4e-6,
    "ratio_lr": 2e-5,
    "ratio_dropout": 0.1,
    "ema_half_life_images": 1_000_000.0,
    "ema_rampup_ratio": 0.05,
}
_IMAGENET512_TRAIN: Values = _BACKBONE | {
    "steps": 100_000,
    "batch_size": 512,
    "generator_lr": 5e-5,
    "ratio_lr": 1e-4,
    "ema_half_life_images": 2_000_000.0,
    "ema_rampup_ratio": 0.05,
}

_EDM: Values = {
    "optimizer": "adam",
    "beta1": 0.9,
    "beta2": 0.999,
    "ema_rampup_ratio": 0.05,
    "noise": "lognormal(-1.2, 1.2)",
    "log_every": 50,
    "eval_every": 5000,
    "checkpoint_every": 1000,
    "snapshot_every": 10_000,
}
_CIFAR10_PRETRAIN: Values = _EDM | {
    "steps": 390_625,
    "batch_size": 512,
    "lr": 1e-3,
    "lr_warmup_steps": 19_531,
    "dropout": 0.13,
    "augment_probability": 0.12,
    "flip_probability": 0.0,  # mirrored images have an augment label instead
    "ema_half_life_images": 500_000.0,
}
_IMAGENET64_PRETRAIN: Values = _EDM | {
    "steps": 610_352,
    "batch_size": 4096,
    "micro_batch": 128,
    "lr": 1e-4,
    "lr_warmup_steps": 2441,
    "dropout": 0.1,
    "ema_half_life_images": 50_000_000.0,
}
_IMAGENET512_PRETRAIN: Values = _EDM | {
    "batch_size": 2048,
    "beta2": 0.99,
    "lr_schedule": "inverse_sqrt",
    "lr_decay_steps": 70_000,
    "lr_warmup_steps": 4883,
    "ema_std": 0.1,
    "posthoc_ema": "0.05,0.1",
    "posthoc_ema_half": True,
    "noise": "lognormal(-0.4, 1.0)",
}

_EDM2_SIZES: dict[str, tuple[float, float, int, int]] = {
    # learning rate and dropout of pre-training, its images in units of 2^20, images in a pass on 80 GB
    "xs": (0.0120, 0.0, 2048, 128),
    "s": (0.0100, 0.0, 2048, 64),
    "m": (0.0090, 0.1, 2048, 32),
    "l": (0.0080, 0.1, 1792, 32),
    "xl": (0.0070, 0.1, 1280, 16),
    "xxl": (0.0065, 0.1, 896, 16),
}

PRESETS: dict[str, Values] = {
    "digits": _DIGITS | _DIGITS_TRAIN,
    "fashion": _FASHION
    | {
        "generator": "backbone",
        "ratio_network": "encoder",
        "threads": 1,
        "steps": 4000,
        "log_every": 25,
        "eval_every": 500,
        "checkpoint_every": 100,
        "snapshot_every": 1000,
        "batch_size": 64,
        "sigma_init": 2.5,
        "generator_lr": 2e-4,
        "ratio_lr": 5e-4,
        "beta1": 0.0,
        "beta2": 0.99,
        "lr_schedule": "cosine",
        "lr_final": 0.1,
        "ratio_weight_decay": 0.01,
        "ratio_warmup_steps": 100,
        "generator_ramp_steps": 100,
        "ema_half_life_images": 10_000.0,
        "divergence": "jensen_shannon",
        "weight": "bounded",
        "ratio_head": "energy",
        "ratio_noise": "loguniform(0.05, 5)",
    },
    "cifar10-small": _CIFAR10_SMALL | _SMALL_TRAIN,
    "folder": _FOLDER | _SMALL_TRAIN | {"batch_size": 64},
    "cifar10": _CIFAR10 | _CIFAR10_TRAIN | {"class_conditional": False},
    "cifar10-cond": _CIFAR10 | _CIFAR10_TRAIN,
    "imagenet64": _IMAGENET64 | _IMAGENET64_TRAIN,
}
"""Preset name to the options of ``train`` that differ from the defaults."""

PRETRAIN_PRESETS: dict[str, Values] = {
    "digits": _DIGITS
    | {
        "threads": 1,
        "steps": 3000,
        "eval_every": 500,
        "checkpoint_every": 500,
        "batch_size": 64,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 100,
        "beta1": 0.9,
        "beta2": 0.99,
        "ema_half_life_images": 20_000.0,
        "noise": "lognormal(-1.2, 1.2)",
    },
    "fashion": _FASHION
    | {
        "threads": 1,
        "steps": 6000,
        "log_every": 25,
        "eval_every": 500,
        "checkpoint_every": 100,
        "snapshot_every": 2000,
        "batch_size": 64,
        "lr": 2e-3,
        "lr_schedule": "cosine",
        "lr_warmup_steps": 100,
        "beta1": 0.9,
        "beta2": 0.99,
        "ema_half_life_images": 20_000.0,
        "noise": "lognormal(-1.2, 1.2)",
    },
    "cifar10-small": _CIFAR10_SMALL | _SMALL_PRETRAIN,
    "folder": _FOLDER | _SMALL_PRETRAIN | {"batch_size": 64},
    "cifar10": _CIFAR10 | _CIFAR10_PRETRAIN | {"class_conditional": False},
    "cifar10-cond": _CIFAR10 | _CIFAR10_PRETRAIN,
    "imagenet64": _IMAGENET64 | _IMAGENET64_PRETRAIN,
}
"""Preset name to the options of ``pretrain`` that differ from the defaults."""

RATIO_NETWORKS: dict[tuple[str, str], Values] = {
    ("digits", "mixer"): {"ratio_width": 64, "ratio_depth": 4, "ratio_lr": 3e-3},
    ("fashion", "mixer"): {
        "ratio_head": "scalar",
        "ratio_width": 64,
        "ratio_depth": 4,
        "ratio_lr": 2e-3,
    },
    ("fashion", "mlp"): {
        "ratio_width": 512,
        "ratio_depth": 4,
        "ratio_lr": 1e-3,
        "ratio_weight_decay": 0.0,
        "noise_draws": 8,
        "divergence": "reverse_kl",
        "weight": "dmd",
    },
}
"""Options that a preset changes for a ratio network other than its own (docs/ratio_mixer.md)."""

DESCRIPTIONS = {
    "digits": "real handwritten digits, 8 x 8, ten classes: trains in minutes on two CPU cores",
    "fashion": "Fashion-MNIST, 28 x 28, ten classes: a small U-Net, within hours on a CPU",
    "cifar10-small": "CIFAR-10, 32 x 32, ten classes: a small U-Net, hours on a consumer GPU, a day on a CPU",
    "folder": "images of one's own at 32 x 32 or 64 x 64: the same, --data DIR",
    "cifar10": "CIFAR-10, 32 x 32, without classes: DDPM++",
    "cifar10-cond": "CIFAR-10, 32 x 32, ten classes: DDPM++",
    "imagenet64": "ImageNet, 64 x 64, 1000 classes: ADM",
}

for _size, (_lr, _dropout, _images, _micro) in _EDM2_SIZES.items():
    _name = f"imagenet512-{_size}"
    _shared = _IMAGENET512 | _backbone(f"edm2:{_size}") | {"micro_batch": _micro}
    PRESETS[_name] = _IMAGENET512_TRAIN | _shared | {"ratio_dropout": _dropout}
    PRETRAIN_PRESETS[_name] = (
        _IMAGENET512_PRETRAIN | _shared | {"lr": _lr, "dropout": _dropout, "steps": _images * 512}
    )
    DESCRIPTIONS[_name] = f"latents of ImageNet, 4 x 64 x 64, 1000 classes: EDM2-{_size.upper()}"

for _name in PRESETS:
    if _name not in ("digits", "fashion"):
        RATIO_NETWORKS[_name, "mixer"] = {"ratio_width": 128, "ratio_depth": 4, "ratio_lr": 1e-3}

DATA_SHAPES: dict[str, tuple[str, tuple[int, int, int], int]] = {
    "digits": ("image", (1, 8, 8), 10),
    "fashion": ("image", (1, 28, 28), 10),
    "cifar10-small": ("image", (3, 32, 32), 10),
    "folder": ("image", (3, 64, 64), 1),
    "cifar10": ("image", (3, 32, 32), 10),
    "cifar10-cond": ("image", (3, 32, 32), 10),
    "imagenet64": ("image", (3, 64, 64), 1000),
    **{f"imagenet512-{size}": ("latent_moments", (8, 64, 64), 1000) for size in _EDM2_SIZES},
}
"""Kind, shape and classes of the data of a preset; a dry run uses them if there is no data set yet."""
