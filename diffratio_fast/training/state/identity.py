"""Identity of a checkpoint: its run, configuration and data set."""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffratio_fast.config.run import RunConfig
from diffratio_fast.data import DataSet
from diffratio_fast.data.dataset import SPLITS, InMemoryDataSet, OneClass
from diffratio_fast.data.shards import ShardDataSet
from diffratio_fast.errors import UserError


@dataclass(frozen=True)
class Identity:
    """Stored in every checkpoint; ``data`` is a digest, ``configuration`` the values of the fixed options.

    ``run`` is empty if the history of the directory has no run ID; then the checkpoint has it.
    """

    run: str
    data: str
    configuration: dict[str, Any]

    def check(self, index: dict[str, Any], where: object, *, accept_data: bool = False) -> None:
        """Raise ``UserError`` with both values if the run cannot resume from the checkpoint of ``index``.

        A checkpoint of an earlier version, without an identity, is accepted.
        """
        run = run_of(index)
        if run is not None and self.run and run != self.run:
            raise UserError(
                f"{where}: belongs to run {run}; the directory belongs to run {self.run}; use one directory "
                "per run, or start from this checkpoint with --resume-from"
            )
        found = index.get("identity")
        options = found.get("configuration") if isinstance(found, dict) else None
        if isinstance(options, dict):
            changed = [
                f"{name} {options[name]} -> {value}"
                for name, value in self.configuration.items()
                if name in options and options[name] != value
            ]
            if changed:
                raise UserError(
                    f"{where}: trained with other settings ({', '.join(changed)}); repeat its options, or "
                    "start "
                    "from it in another directory with --resume-from"
                )
        self.check_data(index, where, accept_data=accept_data)

    def check_data(self, index: dict[str, Any], where: object, *, accept_data: bool = False) -> None:
        """Raise ``UserError`` if the checkpoint was trained on other data, unless ``accept_data``."""
        found = index.get("identity")
        data = found.get("data") if isinstance(found, dict) else None
        if data is None or data == self.data or accept_data:
            return
        raise UserError(
            f"{where}: trained on data with the digest {data}; --data {self.configuration.get('data')} has "
            f"the digest {self.data}; restore the data set, or pass --accept-data to resume with the new data"
        )


def run_of(index: dict[str, Any]) -> str | None:
    """The run ID in the index of a checkpoint."""
    found = index.get("identity")
    run = found.get("run") if isinstance(found, dict) else None
    return run if isinstance(run, str) else None


def fixed_options(config: RunConfig) -> dict[str, Any]:
    """The options that determine the training, by name."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.metadata["free"]
    }


def data_digest(dataset: DataSet) -> str:
    """A digest (32 hexadecimal digits) of a data set's records, labels, splits and scaling.

    For prepared data it depends on the digests in the manifest, not on the records: reading checks the files
    against these digests (``--verify``). It does not depend on the directory.
    """
    state = hashlib.sha256()
    while isinstance(dataset, OneClass):
        dataset = dataset.data
    parts: list[object] = [dataset.kind, tuple(dataset.shape), tuple(dataset.class_names), dataset.scaling]
    if isinstance(dataset, ShardDataSet):
        manifest = dataset.manifest
        parts += [[(shard.records, shard.sha256) for shard in manifest.shards], manifest.splits]
        parts += [sorted(manifest.sha256.items()), manifest.vae]
    elif isinstance(dataset, InMemoryDataSet):
        for split in SPLITS:
            for tensor in dataset.splits[split]:
                parts.append((split, str(tensor.dtype), tuple(tensor.shape)))
                state.update(np.ascontiguousarray(tensor.cpu().numpy()).tobytes())
    state.update(repr(parts).encode())
    return state.hexdigest()[:32]
