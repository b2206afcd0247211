"""Networks by name, and their files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffratio_fast.errors import UserError
from diffratio_fast.networks.backbone import BackboneGenerator, EncoderRatio
from diffratio_fast.networks.mlp import MLPGenerator, MLPRatio
from diffratio_fast.networks.ratio_mixer import RatioMixer
from diffratio_fast.storage.reading import DAMAGE, check_ambition, one_line, parse_json, require_regular
from diffratio_fast.storage.tensors import save_tensors

GENERATORS: dict[str, Callable[..., nn.Module]] = {"mlp": MLPGenerator, "backbone": BackboneGenerator}


RATIO_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": MLPRatio,
    "mixer": RatioMixer,
    "encoder": EncoderRatio,
}


_ROLES = {"generator": GENERATORS, "ratio": RATIO_NETWORKS}


FORMAT_VERSION = 2
"""Files of version 1 lack ``head`` and ``scaled`` of ratio networks, which then have their defaults."""
READABLE = tuple(f"diffratio_fast.network.{version}" for version in (1, 2))


def build(role: str, architecture: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the ``role`` ("generator" or "ratio") network of an architecture, without drawing weights.

    Arguments that the architecture does not have are ignored.
    """
    network = _ROLES[role][architecture]
    known = inspect.signature(network).parameters
    return network(**{name: value for name, value in arguments.items() if name in known})


@dataclass(frozen=True)
class SavedNetwork:
    """Metadata of a network's file; ``data`` describes the training data set."""

    role: str
    architecture: str
    arguments: dict[str, Any]
    data: dict[str, Any]
    training: dict[str, Any]

    @classmethod
    def parse(cls, content: str | dict[str, Any]) -> SavedNetwork:
        """The description, as JSON or parsed; raises ``ValueError`` or ``TypeError`` if it is invalid."""
        about = cls(**(parse_json(content) if isinstance(content, str) else content))
        for name, kind in cls.__annotations__.items():
            if not isinstance(getattr(about, name), str if kind == "str" else dict):
                raise ValueError(f"{name} has the wrong type")
        return about


def save(path: Path, network: nn.Module, about: SavedNetwork, *, root: Path | None = None) -> None:
    """Write a network's weights with its description, atomically, as safetensors.

    Below ``root`` no symbolic link is followed.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    metadata = {"format": f"diffratio_fast.network.{FORMAT_VERSION}", "about": json.dumps(vars(about))}
    save_tensors(path, state, metadata, root=root)


def load(path: Path, role: str) -> tuple[nn.Module, SavedNetwork]:
    """Load a network from a file, on the CPU, in eval mode; raises ``UserError`` for an invalid file."""
    try:
        require_regular(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") not in READABLE:
                raise UserError(
                    f"{path}: not a network file of this version of diffratio_fast; save the network again"
                )
            about = SavedNetwork.parse(metadata["about"])
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, *DAMAGE) as error:
        raise UserError(f"{path}: damaged or not a safetensors file ({one_line(error)})") from None
    if about.role != role:
        raise UserError(f"{path}: contains a {about.role} network; expected a {role} network")
    if about.architecture not in _ROLES[role]:
        raise UserError(f"{path}: unknown architecture {about.architecture!r}")
    try:
        return built(about, state), about
    except (RuntimeError, *DAMAGE) as error:
        raise UserError(f"{path}: the weights do not match the network ({one_line(error)})") from None


def built(about: SavedNetwork, state: Mapping[str, Tensor]) -> nn.Module:
    """The network that ``about`` describes with these weights, in eval mode.

    Raises ``RuntimeError`` or one of ``DAMAGE`` if they do not match.
    """
    check_ambition(about.arguments, sum(tensor.numel() for tensor in state.values()))
    network = build(about.role, about.architecture, about.arguments)
    network.load_state_dict(dict(state))
    return network.eval()
