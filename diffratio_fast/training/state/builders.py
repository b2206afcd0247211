"""Networks of a training run, built from its configuration, without drawing weights."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffratio_fast import networks
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data.dataset import DataSet, model_shape
from diffratio_fast.errors import UserError
from diffratio_fast.networks.backbone import build_denoiser, set_dropout
from diffratio_fast.networks.unet import Denoiser


def network_arguments(config: TrainConfig, dataset: DataSet) -> dict[str, dict[str, Any]]:
    """Constructor arguments of the generator and the ratio network."""
    common = {"shape": model_shape(dataset), "classes": len(dataset.class_names)}
    if config.generator == "backbone" or config.ratio_network == "encoder":
        common |= {"backbone": config.backbone, "options": config.backbone_arguments}
    return {
        "generator": common
        | {
            "latent_size": config.latent_size,
            "width": config.generator_width,
            "depth": config.generator_depth,
            "sigma_init": config.sigma_init,
            "bounds": dataset.scaling.bounds(),
        },
        "ratio": common
        | {
            "width": config.ratio_width,
            "depth": config.ratio_depth,
            "expansion": config.ratio_expansion,
            "patch": config.ratio_patch,
            "middle": config.ratio_middle,
            "pool": config.ratio_pool,
            "dropout": config.ratio_dropout,
            "head": config.ratio_head,
            "scaled": config.ratio_scaled_logit,
        },
    }


def generator(config: TrainConfig, dataset: DataSet) -> nn.Module:
    """The generator; raises ``UserError`` if options do not match the data."""
    return _built("generator", "generator", config.generator, network_arguments(config, dataset))


def ratio_network(config: TrainConfig, dataset: DataSet) -> nn.Module:
    """The ratio network; raises ``UserError`` if options do not match the data."""
    return _built("ratio", "ratio-network", config.ratio_network, network_arguments(config, dataset))


def _built(role: str, option: str, architecture: str, arguments: dict[str, dict[str, Any]]) -> nn.Module:
    try:
        return networks.build(role, architecture, arguments[role])
    except ValueError as error:
        raise UserError(f"--{option} {architecture}: {error}") from None


def backbone(config: RunConfig, dataset: DataSet, **more: Any) -> Denoiser:
    """The denoiser of ``--backbone``; ``more`` are defaults that ``--backbone-options`` overrides."""
    options = more | config.backbone_arguments
    try:
        return build_denoiser(model_shape(dataset), len(dataset.class_names), config.backbone, options)
    except ValueError as error:
        raise UserError(f"--backbone {config.backbone}: {error}") from None


def denoiser(config: TrainConfig, dataset: DataSet) -> Denoiser:
    """A teacher or student: the backbone without dropout, because it estimates a posterior mean."""
    network = backbone(config, dataset)
    set_dropout(network, 0.0)
    return network
