"""Data sets, the order of their records, and loaders. Imports nothing of training."""

from __future__ import annotations

from dataclasses import replace
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
    class_conditional: bool = True,
) -> DataSet:
    """The data set called ``name``, or the prepared one in the directory ``name``; else a ``UserError``.

    ``kind``, where given, is what the records must be: ``image`` or ``latent_moments``. Without
    ``class_conditional`` all records are of one class. The other options are those of ``ShardDataSet``; of
    them ``device`` alone means something to a data set that lives in memory.
    """
    data: DataSet
    if name == "digits":
        from diffratio_fast.data import digits

        data = replace(digits.load(), device=torch.device(device))
    elif Path(name).is_dir():
        from diffratio_fast.data.shards import ShardDataSet

        data = shards = ShardDataSet(name, loader=loader, verify=verify, device=device)
        if kind is not None:
            shards.require(kind=kind)
    else:
        raise UserError(
            f"--data {name}: no such data set; known: digits, or a directory that "
            "`python -m diffratio_fast.prepare` made"
        )
    return data if class_conditional or len(data.class_names) == 1 else OneClass(data)
