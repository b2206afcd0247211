"""Read published EDM and EDM2 snapshots (pickles) as architecture, configuration and weights.

A snapshot is a pickled dictionary with the moving average of the network under "ema". An object of the
published code is pickled as a call with the class name, its source code and its state. The source code is
ignored. The state is that of a module: parameters, buffers, modules, and the constructor arguments.
"""

from __future__ import annotations

import inspect
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffratio_fast.errors import UserError
from diffratio_fast.networks.edm import EDM_MODELS, EDMDenoiser, SongUNet
from diffratio_fast.networks.edm2 import EDM2_CHANNELS, EDM2Denoiser
from diffratio_fast.networks.published import EDM_VARIANTS, Config
from diffratio_fast.storage import pickles
from diffratio_fast.storage.pickles import Record
from diffratio_fast.storage.reading import one_line, open_regular

MAX_DEPTH = 16  # nesting of modules; the published networks have five levels


@dataclass(frozen=True)
class PublishedNetwork:
    """A network as arguments of ``networks.from_published`` and ``load_state_dict``."""

    architecture: str
    config: Config
    state: dict[str, Tensor]


def read_snapshot(path: Path) -> dict[str, Any]:
    """Read the dictionary of a snapshot as plain data and records, without running code from the file.

    Raises ``UserError`` if the file is damaged, is not a snapshot, or refers to a disallowed global.
    """
    try:
        with open_regular(path) as file:
            if file.read(2) == b"PK":
                raise ValueError("a zip archive written by torch.save, not a published snapshot")
            file.seek(0)
            content = pickles.read(file)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: {one_line(error)}") from None
    if not isinstance(content, dict) or not content:
        raise UserError(f"{path}: contains a {type(content).__name__}; expected the dictionary of a snapshot")
    return {str(key): value for key, value in content.items()}


def class_of(value: Any) -> str:
    """Class name of a value in the published code, or the Python type of plain data."""
    if not isinstance(value, Record):
        return type(value).__name__
    if value.name == pickles.PERSISTENT:
        return str(_description(value).get("class_name"))
    return value.name.rpartition(".")[2]


def constructor_arguments(value: Any, names: list[str]) -> dict[str, Any]:
    """Constructor arguments of a published object; ``names`` are the names of the positional arguments."""
    state = _state(value)
    positional = state.get("_init_args") or ()
    keywords = state.get("_init_kwargs") or {}
    if not isinstance(positional, (tuple, list)) or not isinstance(keywords, dict):
        raise ValueError(f"the arguments of {class_of(value)} are not a tuple and a dictionary")
    if len(positional) > len(names):
        raise ValueError(
            f"{class_of(value)} has {len(positional)} positional arguments; expected at most {len(names)}"
        )
    return {**dict(zip(names, positional, strict=False)), **keywords}


def tensors(module: Any) -> dict[str, Tensor]:
    """State dict of a recorded module: parameters and persistent buffers, recursively."""
    return _tensors(module, "", set(), 0)


def _tensors(module: Any, prefix: str, seen: set[int], depth: int) -> dict[str, Tensor]:
    if id(module) in seen or depth > MAX_DEPTH:
        raise ValueError(f"a module occurs twice or is nested deeper than {MAX_DEPTH}: {ascii(prefix)[:100]}")
    seen.add(id(module))
    state = _state(module)
    passing = state.get("_non_persistent_buffers_set") or ()
    found: dict[str, Tensor] = {}
    for group in ("_parameters", "_buffers"):
        for name, value in _dictionary(state, group).items():
            if value is not None and not (group == "_buffers" and name in passing):
                found[f"{prefix}{name}"] = pickles.tensor(value)
    for name, value in _dictionary(state, "_modules").items():
        if value is not None:
            found.update(_tensors(value, f"{prefix}{name}.", seen, depth + 1))
    return found


def published_network(value: Any) -> PublishedNetwork:
    """Architecture, configuration and weights of a recorded network; raises ``ValueError`` if unknown."""
    name = class_of(value)
    if name == "EDMPrecond":
        architecture, config = _edm(value)
    elif name == "Precond":
        config = constructor_arguments(value, _names(EDM2Denoiser))
        sizes = {width: size for size, width in EDM2_CHANNELS.items()}
        architecture = f"edm2:{sizes.get(config.setdefault('model_channels', 192), 'other')}"
    else:
        raise ValueError(
            f"the network has class {ascii(name)[1:-1][:100]}; expected EDMPrecond (EDM) or Precond (EDM2)"
        )
    try:
        config = json.loads(json.dumps(pickles.plain(config), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"the arguments of {name} are not plain data") from None
    return PublishedNetwork(architecture, config, tensors(value))


def _edm(value: Any) -> tuple[str, Config]:
    config = constructor_arguments(value, _names(EDMDenoiser))
    if config.get("sigma_max") == math.inf:  # the default, which JSON cannot represent
        del config["sigma_max"]
    model = class_of(_dictionary(_state(value), "_modules").get("model"))
    if model not in EDM_MODELS:
        raise ValueError(
            f"its U-Net has class {ascii(model)[1:-1][:100]}; expected {' or '.join(EDM_MODELS)}"
        )
    config["model_type"] = model
    if model == "DhariwalUNet":
        return "edm:adm", config
    published = inspect.signature(SongUNet).parameters  # defaults of the class; a variant may have others
    for option in EDM_VARIANTS["ncsnpp"]:
        if option != "model_type":
            config.setdefault(option, published[option].default)
    return f"edm:{'ncsnpp' if config['embedding_type'] == 'fourier' else 'ddpmpp'}", config


def _names(network: type) -> list[str]:
    return [
        name
        for name, parameter in inspect.signature(network).parameters.items()
        if parameter.kind != parameter.VAR_KEYWORD
    ]


def _description(value: Record) -> dict[str, Any]:
    if len(value.arguments) != 1 or not isinstance(value.arguments[0], dict):
        raise ValueError("an object of the published code has no dictionary as description")
    return value.arguments[0]


def _state(value: Any) -> dict[str, Any]:
    if not isinstance(value, Record):
        raise ValueError(f"{type(value).__name__}; expected an object of the published code")
    state = _description(value).get("state") if value.name == pickles.PERSISTENT else value.state
    if not isinstance(state, dict):
        raise ValueError(f"the state of {class_of(value)[:100]} is not a dictionary")
    return state


def _dictionary(state: dict[str, Any], key: str) -> dict[str, Any]:
    value = state.get(key) or {}
    if not isinstance(value, dict):
        raise ValueError(f"{key} is a {type(value).__name__}, not a dictionary")
    return value
