"""Features of a data set's splits, kept beside its shards so that the next run finds them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.manifest import MANIFEST
from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import DAMAGE, read_npz
from diffratio_fast.storage.writing import replacing, sha256_of_file

FOLDER = "evaluation"
FORMAT = "diffratio_fast.evaluation.1"
Arrays = Mapping[str, npt.NDArray[Any]]


class FeatureCache:
    """Arrays by what they are a function of (``about``, JSON); a data set in memory has no cache.

    Files are derived: one that is damaged, or cannot be written, is computed again and ends no run.
    """

    def __init__(self, dataset: DataSet) -> None:
        directory = getattr(getattr(dataset, "data", dataset), "directory", None)
        self._folder = None if directory is None else Path(directory) / FOLDER
        self._data = None if directory is None else sha256_of_file(Path(directory) / MANIFEST)

    def load(self, about: dict[str, Any]) -> Arrays | None:
        """The arrays kept for ``about``; None where there are none."""
        if self._folder is None:
            return None
        path, text = self._path(about)
        try:
            arrays = read_npz(path)
            if str(arrays.pop("about")) != text:
                return None
            if not all(np.isfinite(array).all() for array in arrays.values()):
                return None
        except DAMAGE:
            return None
        return arrays

    def save(self, about: dict[str, Any], arrays: Arrays) -> None:
        """Keep the arrays, where the directory of the data set can be written."""
        if self._folder is None:
            return
        path, text = self._path(about)
        try:
            self._folder.mkdir(exist_ok=True)
            with replacing(path) as file:
                np.savez(file, **{"about": np.array(text), **arrays})  # type: ignore[arg-type]
        except (OSError, UserError):
            return

    def _path(self, about: dict[str, Any]) -> tuple[Path, str]:
        assert self._folder is not None
        text = json.dumps(about | {"format": FORMAT, "data": self._data}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:16]
        return self._folder / f"{about['what']}-{name}.npz", text
