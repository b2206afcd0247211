"""A trained generator as a Python object: images, x0, and the log density ratio."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast import networks, ops
from diffratio_fast.devices import choose_device
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.sampling.sampler import Sampler, VerifiedSampler

Images = npt.NDArray[np.uint8]
Classes = int | str | Sequence[int | str] | Tensor | npt.NDArray[Any] | None
CHUNK = 256
"""Maximum images in memory besides the result."""


class TrainedGenerator:
    """The averaged generator of a run, a snapshot or a file, on a device.

    ``class_names`` are the names of the classes in order; ``shape`` is (C, H, W) of an image. A generator of
    latents without a VAE supports only ``output="x0"``.
    """

    def __init__(self, path: Path, device: torch.device, vae: Path | None, verifier: Path | None) -> None:
        self.path, self.device = path, device
        self._vae, self._verifier = vae, verifier
        self._sampler = Sampler(path, device=device, vae=vae, decode=False)
        self._verified: dict[tuple[Any, ...], VerifiedSampler] = {}
        self._ratio: torch.nn.Module | None = None

    def __repr__(self) -> str:
        size = " x ".join(map(str, self.x0_shape))
        return f"TrainedGenerator({str(self.path)!r}, x0 {size}, {len(self.class_names)} classes)"

    @property
    def class_names(self) -> list[str]:
        return list(self._sampler.class_names)

    @property
    def x0_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of x0, which is pixels or latents."""
        channels, height, width = self._sampler.about.arguments["shape"]
        return channels, height, width

    @property
    def network(self) -> torch.nn.Module:
        """``network(latents [N, *latent_shape], labels int64 [N]) -> x0 [N, C, H, W]``, in eval mode."""
        return self._sampler.generator

    @overload
    def sample(
        self, count: int, classes: Classes = ..., seed: int = ..., *, start: int = ..., candidates: int = ...,
        select: str = ..., sigma: float | None = ..., output: Literal["uint8"] = ...,
    ) -> Images: ...  # fmt: skip

    @overload
    def sample(
        self, count: int, classes: Classes = ..., seed: int = ..., *, start: int = ..., candidates: int = ...,
        select: str = ..., sigma: float | None = ..., output: Literal["x0"],
    ) -> Tensor: ...  # fmt: skip

    def sample(
        self,
        count: int,
        classes: Classes = None,
        seed: int = 0,
        *,
        start: int = 0,
        candidates: int = 1,
        select: str = "resample",
        sigma: float | None = None,
        output: str = "uint8",
    ) -> Images | Tensor:
        """Generate images ``start`` to ``start + count - 1`` of ``seed``, the same as the command ``sample``.

        ``classes``: a number or name, or a list that is repeated; None: all classes, repeated. With
        ``candidates`` > 1, the ratio network of ``refit`` chooses each image from so many candidates;
        ``select`` and ``sigma`` are those of ``sample --select`` and ``--sigma``. Returns a uint8 NumPy array
        [count, H, W, C]. With ``output="x0"`` returns float32 [count, C, H, W] on the device, with standard
        deviation 0.5. Raises ``UserError`` for invalid input.
        """
        if output not in ("uint8", "x0"):
            raise UserError(f"output must be uint8 or x0, not {output!r}")
        if count < 1 or start < 0 or not 0 <= seed < 2**63:
            raise UserError("count must be at least 1, start at least 0, and seed from 0 to 2^63 - 1")
        labels = self.labels(classes, count, start)
        sampler = self._sampler if candidates == 1 else self._with_verifier(candidates, select, sigma)
        parts = range(0, count, CHUNK)
        if output == "x0":
            found = [sampler.x0(seed, start + i, labels[i : i + CHUNK]) for i in parts]
            return torch.cat(found).float()
        images = [sampler.images(seed, start + i, labels[i : i + CHUNK]) for i in parts]
        return np.ascontiguousarray(torch.cat(images).permute(0, 2, 3, 1).numpy())

    def log_ratio(
        self,
        images: Images | Tensor,
        sigma: float,
        classes: Classes = None,
        *,
        seed: int = 0,
        draws: int = 16,
    ) -> Tensor:
        """Return log p_data(x) - log p_gen(x) at noise level ``sigma``, float32 [N]: higher is more real.

        ``images``: clean images, uint8 [N, H, W, C], or x0 as floating point [N, C, H, W]. This method adds
        the noise and returns the mean of ``draws`` draws of ``seed``. ``classes`` as in ``sample``: one per
        image, or repeated. The ratio network is that of ``refit`` if it exists, otherwise that of the run.
        """
        if not 0 < sigma < math.inf or draws < 1:
            raise UserError(f"sigma must be positive and draws at least 1, not {sigma} and {draws}")
        ratio = self._ratio_network()
        x0 = self._as_x0(images).to(self.device, next(ratio.parameters()).dtype)
        labels = self.labels(classes, len(x0)).to(self.device)
        rng, index = ops.make_rng(seed, 0, self.device), torch.arange(len(x0), device=self.device)
        found = []
        with torch.no_grad():
            for part in index.split(CHUNK):
                level = torch.full((len(part),), sigma, dtype=x0.dtype, device=self.device)
                total = torch.zeros(len(part), device=self.device)
                for draw in range(draws):
                    noised = ops.add_noise(x0[part], level, rng, part, ops.Purpose.VERIFIER_NOISE, draw=draw)
                    total += ratio(noised, level, labels[part]).float()
                found.append(total / draws)
        return torch.cat(found)

    def labels(self, classes: Classes, count: int, start: int = 0) -> Tensor:
        """Labels int64 [count] of the images from number ``start`` on: ``classes``, repeated."""
        names = self.class_names
        if classes is None:
            chosen = list(range(len(names)))
        elif isinstance(classes, (int, str)):
            chosen = [self._number(classes)]
        else:
            given = classes.tolist() if isinstance(classes, (Tensor, np.ndarray)) else classes
            chosen = [self._number(one) for one in given]
        if not chosen:
            raise UserError("classes must name at least one class")
        return torch.tensor(chosen)[(start + torch.arange(count)) % len(chosen)]

    def _number(self, one: int | str) -> int:
        names = self.class_names
        if isinstance(one, str) and one in names:
            return names.index(one)
        if isinstance(one, (int, np.integer)) and 0 <= int(one) < len(names):
            return int(one)
        raise UserError(f"no class {one!r}: there are {len(names)}, {names[0]} to {names[-1]}")

    def _with_verifier(self, candidates: int, select: str, sigma: float | None) -> VerifiedSampler:
        key = (candidates, select, sigma)
        if key not in self._verified:
            if candidates < 1 or select not in ("resample", "best"):
                raise UserError("candidates must be at least 1, and select resample or best")
            self._verified[key] = VerifiedSampler(
                self.path, device=self.device, vae=self._vae, candidates=candidates, how=select, sigma=sigma,
                verifier=self._verifier, decode=False,
            )  # fmt: skip
        return self._verified[key]

    def _ratio_network(self) -> torch.nn.Module:
        if self._ratio is None:
            directory = RunPaths(self.path if self.path.is_dir() else self.path.parent)
            known = [directory.refitted, directory.ratio]
            paths = known if self._verifier is None else [self._verifier]
            path = next((path for path in paths if path.exists()), None)
            if path is None:
                raise UserError(f"{paths[-1]}: no such file; name a ratio network with verifier=")
            network, about = networks.load(path, "ratio")
            if about.arguments.get("shape") != self._sampler.about.arguments.get("shape"):
                raise UserError(f"{path}: is for images of another shape than those of {self.path}")
            self._ratio = network.to(self.device).requires_grad_(False)
        return self._ratio

    def _as_x0(self, images: Images | Tensor) -> Tensor:
        given = torch.as_tensor(images)
        if given.is_floating_point():
            x0 = given
        else:
            scaling = self._sampler.scaling
            if given.dtype != torch.uint8 or given.dim() != 4:
                raise UserError("images must be uint8 [N, H, W, C], or x0 as floating point [N, C, H, W]")
            if scaling.low is None or scaling.high is None:
                raise UserError("this generator makes latents: give x0, not uint8 images")
            unit = given.permute(0, 3, 1, 2).float() / 255
            x0 = scaling.to_model(scaling.low + unit * (scaling.high - scaling.low))
        if tuple(x0.shape[1:]) != self.x0_shape or not len(x0):
            raise UserError(
                f"images are {list(x0.shape)}, but x0 is [N, {', '.join(map(str, self.x0_shape))}]"
            )
        return x0


def load_generator(
    path: str | Path,
    *,
    device: str = "auto",
    vae: str | Path | None = None,
    verifier: str | Path | None = None,
) -> TrainedGenerator:
    """See ``diffratio_fast.load_generator``."""
    where = Path(path)
    if not where.exists():
        raise UserError(f"{where}: no such run directory or .safetensors file")
    return TrainedGenerator(
        where,
        choose_device(device),
        None if vae is None else Path(vae),
        None if verifier is None else Path(verifier),
    )
