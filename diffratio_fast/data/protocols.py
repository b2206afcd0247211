"""Names of the published evaluation protocols, and which training sets are whole."""

from __future__ import annotations

from diffratio_fast.data.dataset import DataSet

PROTOCOLS = ("fid", "fdd", "edm")
PUBLISHED_COUNTS = {"cifar10": 50_000, "fashion-mnist": 60_000}
"""Training images of published data sets, by the name that ``prepare`` gives them."""


def has_whole_train(dataset: DataSet) -> bool:
    """Whether no record of the published training set went to another split.

    True where ``prepare --protocol`` made the data set, or its training images are as many as published.
    """
    manifest = getattr(dataset, "manifest", None)
    splits = {} if manifest is None else manifest.source.get("splits") or {}
    if splits.get("whole_train"):
        return True
    return dataset.count("train") == PUBLISHED_COUNTS.get(dataset.name)
