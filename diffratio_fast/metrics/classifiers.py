"""Classifiers that measure how many generated images match their label."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.feature_classifiers import CLASSIFIER_RECORDS
from diffratio_fast.metrics.reference import Measured, Reference, kept_numbers
from diffratio_fast.storage.writing import sha256_of_file


class Classifier(Protocol):
    identity: dict[str, Any]

    def watch(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        """Pass batches through unchanged and record the predictions."""
        ...

    def accuracy(self, measured: Measured) -> float:
        """Fraction of the kept images classified as their label; call after ``watch`` of the same images."""
        ...


class SupportVectors:
    """A support-vector machine on the features of the reference (RBF kernel, C = 10)."""

    def __init__(self, reference: Reference) -> None:
        if reference.features is None or reference.labels is None or len(set(reference.labels.tolist())) < 2:
            raise UserError(
                "--classifier svm: the reference has no labeled features of several classes; use a data set "
                "as --reference"
            )
        from sklearn.svm import SVC

        chosen = kept_numbers(len(reference.labels), CLASSIFIER_RECORDS)
        self._machine = SVC(C=10.0, gamma="scale")
        self._machine.fit(reference.features[chosen].astype(np.float64), reference.labels[chosen])
        self.identity = {"name": "svm", "fitted_on": len(chosen)}

    def watch(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        return batches

    def accuracy(self, measured: Measured) -> float:
        return _share(self._machine.predict(measured.set.features.astype(np.float64)), measured)


class ExportedProgram:
    """A network that ``torch.export.save`` wrote: uint8 images [b, C, H, W] to logits [b, classes], any b.

    Such a file is a program and is executed, unlike all other files. Pickles in it are not executed.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        try:
            with _without_pickles():
                self._network = torch.export.load(path).module().to(device)
        except Exception as error:  # torch raises many exception types for an invalid file
            detail = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(
                f"--classifier {path}: expected svm or a file of torch.export.save ({detail})"
            ) from None
        self._device = device
        self.identity = {"name": path.name, "sha256": sha256_of_file(path)}
        self._named: list[npt.NDArray[np.int64]] = []

    def watch(self, batches: Iterator[Tensor]) -> Iterator[Tensor]:
        self._named = []
        for batch in batches:
            try:
                logits = self._network(batch.to(self._device))
                self._named.append(logits.argmax(1).cpu().numpy())
            except (RuntimeError, AttributeError, AssertionError, TypeError, IndexError) as error:
                detail = (str(error).splitlines() or [""])[0][:200]
                raise UserError(
                    f"--classifier: the program cannot process uint8 images {list(batch.shape)} ({detail})"
                ) from None
            yield batch

    def accuracy(self, measured: Measured) -> float:
        named = np.concatenate(self._named)
        return _share(named[kept_numbers(len(named))], measured)


@contextlib.contextmanager
def _without_pickles() -> Iterator[None]:
    """Disable torch.export's fallback that executes the pickles of a file."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _share(named: npt.NDArray[np.int64], measured: Measured) -> float:
    assert measured.labels is not None
    return float((named == measured.labels).mean())
