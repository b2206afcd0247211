"""Options of pre-training."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio_fast.config.options import option
from diffratio_fast.config.run import RunConfig


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
