"""Named configurations: what each sets apart from the defaults, and where its numbers come from."""

from __future__ import annotations

from typing import Any

DEFAULT = "digits"

PRESETS: dict[str, dict[str, Any]] = {
    "digits": {
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
    },
}

RATIO_NETWORKS: dict[tuple[str, str], dict[str, Any]] = {
    ("digits", "mixer"): {"ratio_width": 64, "ratio_depth": 4, "ratio_lr": 3e-3},
}
"""What a preset sets otherwise with another ratio network than its own (docs/ratio_mixer.md)."""

DESCRIPTIONS = {
    "digits": "real handwritten digits, 8 x 8, ten classes: trains in minutes on two CPU cores",
}
