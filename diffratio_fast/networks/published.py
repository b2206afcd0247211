"""Networks by the architecture and configuration of a published checkpoint, and their files.

An architecture is "family:variant". Families: "edm" (variants ddpmpp, ncsnpp, adm) and "edm2" (xxs, xs, s, m,
l, xl, xxl). A configuration contains options of the published constructor. A variant sets the defaults of the
options that define it; all other options have the published defaults. Any other variant name is a label, and
the configuration must then contain "model_type" (edm) or "model_channels" (edm2). The family "mlp" is this
package's denoiser for small images.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffratio_fast.errors import UserError
from diffratio_fast.networks.edm import EDM_MODELS, EDMDenoiser
from diffratio_fast.networks.edm2 import EDM2_CHANNELS, EDM2Denoiser, MPUNet
from diffratio_fast.networks.mlp import MLPDenoiser
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.storage.reading import DAMAGE, check_ambition, one_line, parse_json, require_regular
from diffratio_fast.storage.tensors import save_tensors

Config = dict[str, Any]

EDM_VARIANTS: dict[str, Config] = {
    "ddpmpp": {
        "model_type": "SongUNet",
        "embedding_type": "positional",
        "encoder_type": "standard",
        "decoder_type": "standard",
        "channel_mult_noise": 1,
        "resample_filter": [1, 1],
    },
    "ncsnpp": {
        "model_type": "SongUNet",
        "embedding_type": "fourier",
        "encoder_type": "residual",
        "decoder_type": "standard",
        "channel_mult_noise": 2,
        "resample_filter": [1, 3, 3, 1],
    },
    "adm": {"model_type": "DhariwalUNet"},
}
EDM2_VARIANTS: dict[str, Config] = {name: {"model_channels": width} for name, width in EDM2_CHANNELS.items()}

_MINIMUM = {  # integer options and their minimum values
    "img_resolution": 1, "img_channels": 1, "label_dim": 0, "augment_dim": 0, "model_channels": 1,
    "channel_mult_emb": 1, "channel_mult_noise": 1, "num_blocks": 1, "channels_per_head": 1,
    "logvar_channels": 1, "width": 1, "depth": 1,
}  # fmt: skip
_OPTIONAL = {"channel_mult_emb", "channel_mult_noise", "clip_act"}  # None is a value for these, in EDM2
_FRACTIONS = {"dropout", "label_dropout", "label_balance", "concat_balance", "res_balance", "attn_balance"}


def from_published(architecture: str, config: str | Mapping[str, Any]) -> Denoiser:
    """Build the denoiser of a published architecture; its state dict has the published names and shapes.

    ``config``: options of the published constructor, as a mapping or as JSON. The weights are float32 and
    have the published initial distributions, drawn by torch's generator; the network is in training mode.
    It stores both arguments as ``architecture`` and ``config``. Raises ``ValueError`` for unknown or invalid
    options.
    """
    family, _, variant = architecture.partition(":")
    options = _as_mapping(config)
    if family == "edm":
        defaults = EDM_VARIANTS.get(variant, {})
        model_type = options.get("model_type", defaults.get("model_type"))
        if model_type is None:
            raise _unknown(architecture, EDM_VARIANTS, "model_type")
        if model_type not in EDM_MODELS:
            raise ValueError(f"model_type must be one of {', '.join(EDM_MODELS)}, not {model_type!r}")
        if model_type != defaults.get("model_type", model_type):
            raise ValueError(f"model_type {model_type} contradicts the architecture {architecture}")
        network_class: type[Denoiser] = EDMDenoiser
        backbone: type = EDM_MODELS[model_type]
    elif family == "edm2":
        defaults = EDM2_VARIANTS.get(variant, {})
        if not defaults and "model_channels" not in options:
            raise _unknown(architecture, EDM2_VARIANTS, "model_channels")
        network_class, backbone = EDM2Denoiser, MPUNet
    elif architecture == "mlp":
        defaults, network_class, backbone = {}, MLPDenoiser, MLPDenoiser
    else:
        raise ValueError(f"unknown architecture {architecture!r}; expected family edm, edm2 or mlp")
    known = _parameters(network_class) | _parameters(backbone)
    known -= {"in_channels", "out_channels", "model_kwargs", "unet_kwargs"}
    if unknown := sorted(set(options) - known):
        raise ValueError(
            f"unknown option {unknown[0]!r} for {architecture}; known: {', '.join(sorted(known))}"
        )
    if missing := [name for name in ("img_resolution", "img_channels") if name not in options]:
        raise ValueError(f"the configuration of {architecture} has no {missing[0]!r}; add it")
    arguments = {**defaults, **options}
    for name, value in arguments.items():
        _check(name, value, optional=family == "edm2" and name in _OPTIONAL)
    network = network_class(**arguments)
    network.architecture, network.config = architecture, dict(options)
    return network


def resolved(architecture: str, config: str | Mapping[str, Any]) -> Config:
    """All options, including defaults, that determine a network in eval mode without augment labels."""
    family, _, variant = architecture.partition(":")
    variants = {"edm": EDM_VARIANTS, "edm2": EDM2_VARIANTS}.get(family, {})
    given = {**variants.get(variant, {}), **_as_mapping(config)}
    network: type[Denoiser] = {"edm": EDMDenoiser, "edm2": EDM2Denoiser, "mlp": MLPDenoiser}[family]
    backbone = {
        "edm": EDM_MODELS[given.get("model_type", "DhariwalUNet")], "edm2": MPUNet, "mlp": MLPDenoiser
    }[family]  # fmt: skip
    options = {"family": family}
    for constructor in (backbone, network):
        for name, parameter in inspect.signature(constructor).parameters.items():
            if parameter.default is not inspect.Parameter.empty:
                options[name] = parameter.default
    options |= given
    passed_over = ("dropout", "label_dropout", "augment_dim", "use_fp16", "sigma_min", "sigma_max")
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in options.items()
        if name not in passed_over
    }


def load_published(path: Path | str) -> tuple[Denoiser, dict[str, str]]:
    """Load the denoiser in a file of ``diffratio_fast.convert``: (network, metadata of the file).

    The network is on the CPU, in float32 and eval mode. A file with tensors named ``state.*`` is accepted
    too (its other tensors are ignored). Raises ``UserError`` for an invalid file.
    """
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            prefix = "state." if any(name.startswith("state.") for name in names) else ""
            state = {
                name.removeprefix(prefix): file.get_tensor(name) for name in names if name.startswith(prefix)
            }
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({error})") from None
    if missing := [key for key in ("architecture", "config") if key not in metadata]:
        raise UserError(
            f"{path}: no {missing[0]!r} in its metadata; create the file with python -m "
            "diffratio_fast.convert"
        )
    try:
        network = with_state(metadata["architecture"], metadata["config"], state)
    except DAMAGE as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    return network.float().eval(), metadata


def save_published(
    path: Path, network: Denoiser, about: Mapping[str, str], *, root: Path | None = None
) -> None:
    """Write a denoiser as ``load_published`` reads it, atomically; ``about`` joins the file's metadata.

    Below ``root`` no symbolic link is followed.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    config = json.dumps(network.config)
    metadata = {**about, "architecture": network.architecture, "config": config}
    save_tensors(path, state, metadata, root=root)


def with_state(
    architecture: str, config: str | Mapping[str, Any], state: Mapping[str, torch.Tensor]
) -> Denoiser:
    """``from_published`` with the tensors of ``state``, not copied; all names and shapes must match."""
    check_ambition(_as_mapping(config), sum(tensor.numel() for tensor in state.values()))
    with torch.device("meta"):  # skips drawing weights that are replaced
        network = from_published(architecture, config)
    try:
        network.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:]] or [str(error)]
        raise ValueError(f"the weights do not match {architecture}: {reasons[0][:300]}") from None
    return network


def _as_mapping(config: str | Mapping[str, Any]) -> Config:
    if isinstance(config, str):
        try:
            config = parse_json(config)
        except ValueError as error:
            raise ValueError(f"the configuration is not JSON: {error}") from None
    if not isinstance(config, Mapping) or not all(isinstance(name, str) for name in config):
        raise ValueError(f"the configuration must map option names to values, not {config!r}")
    return dict(config)


def _unknown(architecture: str, variants: Mapping[str, Config], option: str) -> ValueError:
    return ValueError(
        f"unknown architecture {architecture!r}; expected a variant of {', '.join(variants)} (another name "
        "needs "
        f"{option!r} in the configuration)"
    )


def _parameters(network: type) -> set[str]:
    return set(inspect.signature(network).parameters)


def _check(name: str, value: Any, *, optional: bool) -> None:
    """Raise ``ValueError`` unless ``value`` is valid for the option ``name``."""
    if optional and value is None:
        return
    if name in _MINIMUM:
        kind, right = f"an integer of at least {_MINIMUM[name]}", _integer(value, _MINIMUM[name])
    elif name in ("channel_mult", "attn_resolutions"):
        kind = "a list of integers above 0"
        right = isinstance(value, (list, tuple)) and all(_integer(item, 1) for item in value)
        if name == "channel_mult" and right and not value:
            kind, right = "a list of at least one integer above 0", False
    elif name == "resample_filter":
        kind = "a list of numbers"
        right = isinstance(value, (list, tuple)) and all(_number(item) for item in value)
    elif name in _FRACTIONS:
        kind, right = "a number from 0 to 1", _number(value) and 0 <= value <= 1
    elif name in ("sigma_data", "clip_act"):
        kind, right = "a number above 0", _number(value) and 0 < value < math.inf
    else:
        return
    if not right:
        raise ValueError(f"{name} must be {kind}, not {value!r}")


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
