"""Data sets, the order of their records, and loaders. Imports nothing of training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from diffratio_fast.data.dataset import DataSet, OneClass
from diffratio_fast.errors import UserError


def open_dataset(
    name: str,
    *,
    loader: str = "native",
    verify: str = "first_epoch",
    device: torch.device | str = "cpu",
    class_conditional: bool = True,
) -> DataSet:
    """The data set called ``name``, or the prepared one in the directory ``name``; else a ``UserError``.

    Without ``class_conditional`` all records have class 0. ``loader`` and ``verify`` are options of
    ``ShardDataSet`` and are ignored for a data set in memory.
    """
    data: DataSet
    if name == "digits":
        from diffratio_fast.data import digits

        data = replace(digits.load(), device=torch.device(device))
    elif Path(name).is_dir():
        from diffratio_fast.data.shards import ShardDataSet

        data = ShardDataSet(name, loader=loader, verify=verify, device=device)
    else:
        raise UserError(
            f"--data {name}: no such data set; known: digits, or a directory that "
            "`python -m diffratio_fast.prepare` made"
        )
    return data if class_conditional or len(data.class_names) == 1 else OneClass(data)
