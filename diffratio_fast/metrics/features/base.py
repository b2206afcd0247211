"""What an extractor is, what it gives, and how its weights are read."""

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
    """What the figures of a feature space are called; only the FID network's are FID, KID and IS."""

    frechet: str = "frechet_distance"
    kernel: str = "kernel_distance"
    score: str = "classifier_score"


@dataclass(frozen=True)
class Extractor:
    """``network`` takes uint8 images [b, 3 or C, H, W] to features [b, dimension] and logits or None.

    ``identity`` says what the features are functions of, as JSON: name, weights' sha256, resizing.
    """

    network: nn.Module
    dimension: int
    identity: dict[str, Any]
    batch: int = 32
    colour: bool = True
    names: Names = field(default_factory=Names)

    @property
    def name(self) -> str:
        return str(self.identity["name"])

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features float32 [b, D] and logits [b, K] (None if it is no classifier) of uint8 [b, C, H, W]."""
        device = next((p.device for p in self.network.parameters()), images.device)
        if self.colour and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        features, logits = self.network(images.to(device))
        return features.float(), None if logits is None else logits.float()


class FeatureSet:
    """Features of a set of images: the moments of all, the vectors of those that were kept."""

    def __init__(self, extractor: Extractor) -> None:
        self.extractor = extractor
        self._sums = RunningMoments(extractor.dimension)
        self._features: list[Array] = []
        self._logits: list[Array] = []

    def add(self, features: Tensor, chosen: Any, logits: Tensor | None) -> None:
        values = features.cpu().numpy()
        if not np.isfinite(values).all():
            raise UserError(f"{self.extractor.name}: features of image {self.count} and on are not finite")
        self._sums.add(values)
        self._features.append(values[chosen])
        if logits is not None:
            self._logits.append(logits.cpu().numpy()[: len(values)][chosen])

    @property
    def count(self) -> int:
        """Images behind the moments."""
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
        """float32 [kept, K], None where the extractor is no classifier."""
        self._logits = [np.concatenate(self._logits)] if self._logits else []
        return self._logits[0] if self._logits else None


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """The state dict in a safetensors file or a torch file (nothing in it is run), and the file's sha256."""
    try:
        sha256 = sha256_of_file(path)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path), sha256
        with path.open("rb") as file:
            pickles.check_torch_file(file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old storages
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
    """``file`` in torch.hub's cache; a ``UserError`` says where it is from."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if not path.is_file():
        raise UserError(
            f"--features {features}: needs {file} (from {source}); name it with --weights or put it in "
            f"{path.parent}, or choose other --features"
        )
    return path


def fill(network: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Load a state dict; one that does not fit is a ``UserError``."""
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not the weights of this network ({detail})") from None


def resize_bicubic(images: Tensor, size: int) -> Tensor:
    """uint8 [b, C, H, W] to float32 [b, C, size, size] in 0..255: bicubic, antialiased, not rounded."""
    if images.shape[-2:] == (size, size):
        return images.float()
    return F.interpolate(images.float(), size=(size, size), mode="bicubic", antialias=True)
