"""Options of ``pretrain``: what each group adds to those of ``config.run``."""

from __future__ import annotations

from dataclasses import dataclass

from diffratio_fast.config.options import Options, option
from diffratio_fast.config.run import AugmentationOptions, NetworkOptions, OptimizationOptions, RunConfig
from diffratio_fast.errors import UserError


@dataclass(frozen=True)
class PretrainNetworkOptions(NetworkOptions):
    dropout: float = option(0.0, "dropout of the denoiser's blocks", low=0, high=0.99)


@dataclass(frozen=True)
class PretrainOptimizationOptions(OptimizationOptions):
    lr: float = option(1e-3, "learning rate", low=0)
    weight_decay: float = option(0.0, "weight decay", low=0)


@dataclass(frozen=True)
class DenoisingOptions(Options, group="objective"):
    noise: str = option("lognormal(-1.2, 1.2)", "law of sigma")
    stable_targets: bool = option(
        False,
        "denoise to the posterior mean of the pass's images of a class; depends on --micro-batch and the "
        "number of processes",
    )


@dataclass(frozen=True)
class PretrainAugmentationOptions(AugmentationOptions):
    augment_probability: float = option(
        0.0,
        "probability of each of EDM's geometric transforms, which are inputs of the denoiser; above 0, every "
        "other image is mirrored too",
        low=0,
        high=1,
    )


@dataclass(frozen=True)
class PretrainConfig(
    PretrainAugmentationOptions,
    DenoisingOptions,
    PretrainOptimizationOptions,
    PretrainNetworkOptions,
    RunConfig,
):
    """All options of the pre-training of a denoiser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.noise_law("noise")
        if self.stable_targets and self.augment_probability:
            raise UserError(
                "--stable-targets is for images without augmentation; set --augment-probability 0, or leave "
                "it out"
            )

    def networks_text(self) -> dict[str, str]:
        return {"denoiser": self.backbone}

    def objective_text(self) -> str:
        return f"denoising, sigma {self.noise}"
