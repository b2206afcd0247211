"""Data sets, the order of their records, and loaders. Imports nothing from training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from diffratio_fast.data.dataset import DataSet, OneClass
from diffratio_fast.data.known import how_to_make
from diffratio_fast.errors import UserError


def open_dataset(
    name: str,
    *,
    loader: str = "native",
    verify: str = "first_epoch",
    device: torch.device | str = "cpu",
    class_conditional: bool = True,
) -> DataSet:
    """Open the data set ``name``: ``digits``, or the directory of a prepared data set.

    With ``class_conditional=False`` all records have class 0. ``loader`` and ``verify`` are options of
    ``ShardDataSet`` and are ignored for a data set in memory. Raises ``UserError`` for an unknown name.
    """
    data: DataSet
    if name == "digits":
        from diffratio_fast.data import digits

        data = replace(digits.load(), device=torch.device(device))
    elif Path(name).is_dir():
        from diffratio_fast.data.shards import ShardDataSet

        data = ShardDataSet(name, loader=loader, verify=verify, device=device)
    else:
        raise UserError(f"--data {name}: no such data set; {how_to_make(name)}")
    return data if class_conditional or len(data.class_names) == 1 else OneClass(data)
