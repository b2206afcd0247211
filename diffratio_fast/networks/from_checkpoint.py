"""The averaged generator of an interrupted run, from its newest checkpoint."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from diffratio_fast.errors import UserError
from diffratio_fast.networks.saved import SavedNetwork, built
from diffratio_fast.storage.checkpoints import newest_complete
from diffratio_fast.storage.reading import DAMAGE, one_line

PREFIX = "average."


def load_average(checkpoints: Path) -> tuple[nn.Module, SavedNetwork, Path, str]:
    """The average in the newest complete checkpoint: network, description, the checkpoint and its digest.

    On the CPU, in eval mode. Raises ``UserError`` if there is none, or it has no generator.
    """
    newest = newest_complete(checkpoints)
    if newest is None:
        raise UserError(f"{checkpoints}: holds no complete checkpoint")
    path, index = newest
    try:
        about = SavedNetwork.parse(index["network"])
        about.training["step"] = index["step"]
        if about.role != "generator":
            raise ValueError(f"the network of a {about.role}")
    except DAMAGE as error:
        raise UserError(f"{path}: no description of a generator ({one_line(error)})") from None
    try:
        state = _average(path, sorted(index["files"]))
        network = built(about, state)
    except (SafetensorError, RuntimeError, *DAMAGE) as error:
        raise UserError(f"{path}: its average cannot be read ({one_line(error)})") from None
    digest = "-".join(file["xxh3_128"] for _, file in sorted(index["files"].items()))
    return network, about, path, digest


def _average(path: Path, files: list[str]) -> dict[str, Tensor]:
    """The tensors of the average without their prefix, merged from the files of all processes."""
    if len(files) == 1:
        with safe_open(path / files[0], "pt") as file:
            return {
                name.removeprefix(PREFIX): file.get_tensor(name)
                for name in file.keys()  # noqa: SIM118
                if name.startswith(PREFIX)
            }
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    reader = HuggingFaceStorageReader(str(path))
    sizes: dict[str, Any] = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.zeros(tuple(about.size), dtype=about.properties.dtype)
        for name, about in sizes.items()
        if name.startswith(PREFIX)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(tensors, storage_reader=reader, no_dist=True)
    return {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
