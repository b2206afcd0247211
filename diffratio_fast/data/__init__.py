"""Data sets, the order of their records, and loaders. Imports nothing of training."""

from __future__ import annotations

from diffratio_fast.command import UserError
from diffratio_fast.data.dataset import SIGMA_DATA, SPLITS, DataSet, InMemoryDataSet, Scaling

__all__ = ["SIGMA_DATA", "SPLITS", "DataSet", "InMemoryDataSet", "Scaling", "open_dataset"]


def open_dataset(name: str) -> DataSet:
    """The data set called ``name``; an unknown name is a ``UserError``."""
    if name == "digits":
        from diffratio_fast.data import digits

        return digits.load()
    raise UserError(f"--data {name}: no such data set; known: digits")
