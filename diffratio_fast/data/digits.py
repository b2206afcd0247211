"""The default data set: 1,797 real scans of handwritten digits, 8 x 8, 17 gray levels, ten classes.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, doi:10.24432/C50P49 (the test part, 13 writers; the copy that scikit-learn ships as
``load_digits``). License: Creative Commons Attribution 4.0 International (CC BY 4.0).

``digits.npz`` holds ``images`` uint8 (1797, 8, 8) with values 0..16 in the original order, ``labels``
uint8 (1797,), and ``split`` uint8 (1797,): 0 train (1,350), 1 validation (150), 2 test (297). The
splits are random, stratified by class, and fixed by this file.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from diffratio_fast.data.dataset import SPLITS, InMemoryDataSet
from diffratio_fast.data.scaling import Scaling

FILE = Path(__file__).with_name("digits.npz")


def load() -> InMemoryDataSet:
    """The digits as a data set: records uint8 [N, 1, 8, 8], scaled by the training split's statistics."""
    with np.load(FILE) as archive:
        images, labels, split = archive["images"], archive["labels"], archive["split"]
    records = torch.from_numpy(images)[:, None]
    targets = torch.from_numpy(labels.astype(np.int64))
    splits = {name: (records[split == i], targets[split == i]) for i, name in enumerate(SPLITS)}
    train = splits["train"][0].double()
    return InMemoryDataSet(
        name="digits",
        class_names=tuple(str(i) for i in range(10)),
        scaling=Scaling((train.mean().item(),), (train.std(correction=0).item(),), 0.0, 16.0),
        splits=splits,
    )
