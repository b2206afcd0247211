"""The extractor interface, its results, and reading of weights."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn import functional as F

from diffratio_fast.errors import UserError
from diffratio_fast.metrics.frechet import Moments, RunningMoments
from diffratio_fast.storage import pickles
from diffratio_fast.storage.writing import sha256_of_file

Array = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Names:
    """Names of the metrics of a feature space; only those of the FID network are FID, KID and IS."""

    frechet: str = "frechet_distance"
    kernel: str = "kernel_distance"
    score: str = "classifier_score"


@dataclass(frozen=True)
class Extractor:
    """``network`` takes uint8 images [b, 3 or C, H, W] to features [b, dimension] and logits or None.

    ``identity`` (JSON data) determines the features: name, sha256 of the weights, resizing.
    """

    network: nn.Module
    dimension: int
    identity: dict[str, Any]
    batch: int = 32
    color: bool = True
    names: Names = field(default_factory=Names)

    @property
    def name(self) -> str:
        return str(self.identity["name"])

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features float32 [b, D] and logits [b, K] (None without a classifier) of uint8 [b, C, H, W]."""
        device = next((p.device for p in self.network.parameters()), images.device)
        if self.color and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features, logits = self.network(images.to(device))
        return features.float(), None if logits is None else logits.float()


class FeatureSet:
    """Features of a set of images: the moments of all images, the vectors of the kept images."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self._sums = RunningMoments(extractor.dimension)
        self._features: list[Array] = []
        self._logits: list[Array] = []

    def add(self, features: Tensor, chosen: Any, logits: Tensor | None) -> None:
        values = features.cpu().numpy()
        if not np.isfinite(values).all():
            raise UserError(
                f"{self.extractor.name}: features from image {self.count} on are not finite; check the "
                "weights"
            )
        self._sums.add(values)
        self._features.append(values[chosen])
        if logits is not None:
            self._logits.append(logits.cpu().numpy()[: len(values)][chosen])

    @property
    def count(self) -> int:
        """Number of images in the moments."""
        return self._sums.count

    @property
    def moments(self) -> Moments:
        return self._sums.moments()

    @property
    def features(self) -> Array:
        """float32 [kept, D]"""
        self._features = [np.concatenate(self._features)] if self._features else []
        return self._features[0] if self._features else np.empty((0, self.extractor.dimension), np.float32)

    @property
    def logits(self) -> Array | None:
        """Logits float32 [kept, K]; None if the extractor has no classifier."""
        self._logits = [np.concatenate(self._logits)] if self._logits else []
        return self._logits[0] if self._logits else None


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read the state dict of a safetensors or torch file (without executing it), and the file's sha256."""
    try:
        sha256 = sha256_of_file(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path), sha256
        with path.open("rb") as file:
            pickles.check_torch_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation of typed storages
            state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except (SafetensorError, Exception) as error:  # torch.load raises whatever a damaged file leads it to
        reason = (str(error)[:10_000].splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{path}: damaged, or no file of weights ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path}: holds no state dict of tensors")
    return state, sha256


def cached_weights(file: str, features: str, source: str) -> Path:
    """Path of ``file`` in torch.hub's cache; if it is missing, a ``UserError`` names its source."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise UserError(
            f"--features {features}: {file} is missing (source: {source}); set --weights to its path, put "
            "it in "
            f"{path.parent}, or choose other --features"
        )
    return path


def fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict; raises ``UserError`` if it does not match the network."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the weights of this network ({detail})") from None


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """Resize uint8 [b, C, H, W] to float32 [b, C, size, size], 0..255: bicubic, antialiased, not rounded."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
