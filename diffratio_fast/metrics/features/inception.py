"""The FID network: Inception of 2015-12-05 with TensorFlow 1's resizing, as implemented by torch-fidelity."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features.base import Extractor, Names, cached_weights, read_weights

FILE = "weights-inception-2015-12-05-6726825d.pth"
PUBLISHED = "6726825d"
"""First digits of the sha256 of the published weights."""
SOURCE = "github.com/toshas/torch-fidelity/releases, v0.2.0"
DIMENSION = 2048


class _Inception(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features, logits = self.network(images)
        return features, logits


def load_inception(weights: Path | None, shape: tuple[int, int, int]) -> Extractor:
    """Pooled features [b, 2048], and logits without bias as in the reference code of the Inception Score."""
    path = weights or cached_weights(FILE, "inception", SOURCE)
    _, sha256 = read_weights(path)  # torch-fidelity would execute the pickle of a hostile file
    module = _torch_fidelity()
    try:
        network = module.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path)
        )
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the weights of this network ({detail})") from None
    published = sha256.startswith(PUBLISHED)
    identity = {
        "name": "inception",
        "weights_sha256": sha256,
        "published_weights": published,
        "size": 299,
        "resize": "bilinear of TensorFlow 1",
    }
    names = Names("fid", "kid", "inception_score") if published else Names()
    return Extractor(_Inception(network), DIMENSION, identity, names=names)


@cache
def _torch_fidelity() -> Any:
    """Import the network module of torch-fidelity.

    The package imports torchvision, which must match the exact version of torch and is not needed here. If
    that import fails, the module is imported without the ``__init__`` of the package.
    """
    try:
        return _import()
    except (ImportError, RuntimeError):
        _forget()
    found = importlib.util.find_spec("torch_fidelity")
    if found is None or found.submodule_search_locations is None:
        raise UserError(
            "--features inception: torch-fidelity is not installed; pip install --no-deps torch-fidelity"
        )
    package = types.ModuleType("torch_fidelity")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["torch_fidelity"] = package
    try:
        return _import()
    finally:
        _forget()


def _import() -> Any:
    return importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")


def _forget() -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"]:
        del sys.modules[name]
