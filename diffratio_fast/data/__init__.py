"""Data sets, the order of their records, and loaders. Imports nothing of training."""

from __future__ import annotations

from pathlib import Path

import torch

from diffratio_fast.command import UserError
from diffratio_fast.data.dataset import (
    SIGMA_DATA,
    SPLITS,
    DataSet,
    InMemoryDataSet,
    OneClass,
    Scaling,
    model_shape,
    to_model,
)

__all__ = [
    "SIGMA_DATA",
    "SPLITS",
    "DataSet",
    "InMemoryDataSet",
    "OneClass",
    "Scaling",
    "model_shape",
    "open_dataset",
    "to_model",
]


def open_dataset(
    name: str,
    *,
    kind: str | None = None,
    loader: str = "native",
    verify: str = "first_epoch",
    device: torch.device | str = "cpu",
) -> DataSet:
    """The data set called ``name``, or the prepared one in the directory ``name``; else a ``UserError``.

    ``kind``, where given, is what the records must be: ``image`` or ``latent_moments``. The other options
    are those of ``ShardDataSet``, and mean nothing to a data set that lives in memory.
    """
    if name == "digits":
        from diffratio_fast.data import digits

        return digits.load()
    if Path(name).is_dir():
        from diffratio_fast.data.shards import ShardDataSet

        data = ShardDataSet(name, loader=loader, verify=verify, device=device)
        if kind is not None:
            data.require(kind=kind)
        return data
    raise UserError(
        f"--data {name}: no such data set; known: digits, or a directory that "
        "`python -m diffratio_fast.prepare` made"
    )
