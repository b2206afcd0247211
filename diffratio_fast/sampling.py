"""A trained generator as a source of images: (seed, numbers, labels) to uint8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio_fast import networks
from diffratio_fast.command import UserError
from diffratio_fast.data import Scaling
from diffratio_fast.files import sha256_of_file
from diffratio_fast.images import to_uint8


class Sampler:
    """The generator of a run directory or of a ``.safetensors`` file, with what its images need.

    ``class_names``, ``scaling`` and ``about`` are the file's own description; ``vae`` is the directory of
    the VAE that decodes latents, and None for pixels.
    """

    def __init__(self, run: Path, *, device: torch.device, vae: Path | None = None) -> None:
        path = run / "generator.safetensors" if run.is_dir() else run
        if run.is_dir() and not path.exists():
            raise UserError(
                f"{run}: holds no generator.safetensors yet; finish its training, or name a snapshot"
            )
        self.generator, self.about = networks.load(path, "generator")
        self.generator.to(device)
        self.sha256 = sha256_of_file(path)
        self.scaling = Scaling(**self.about.data["scaling"])
        self.class_names: list[str] = self.about.data["class_names"]
        self._decoder = None
        if self.scaling.low is not None:
            if vae is not None:
                raise UserError(f"{path}: makes pixels, not latents; leave --vae out")
        elif vae is None:
            raise UserError(f"{path}: makes latents; name the VAE that decodes them with --vae DIR")
        else:
            self._decoder = _decoder(path, vae, self.about.data.get("vae"), device)

    def x0(self, seed: int, start: int, labels: Tensor) -> Tensor:
        """Samples ``start`` to ``start + N - 1`` of ``seed`` with labels int64 [N]: x0 [N, C, H, W].

        What a sample is depends on (seed, number, label) alone. Another way to come by samples (the best
        of several candidates, say) takes this function's place, and all commands follow.
        """
        return networks.generate(self.generator, labels, seed, start)

    def images(self, seed: int, start: int, labels: Tensor) -> Tensor:
        """The samples as uint8 [N, C, H, W] on the CPU, rounded to nearest; latents are decoded."""
        x0 = self.x0(seed, start, labels)
        if self._decoder is None:
            return to_uint8(x0, self.scaling)
        return self._decoder.decode(self.scaling.to_records(x0.float()))

    def identity(self) -> dict[str, Any]:
        """What the images are a function of beside seed, number and label."""
        vae = None if self._decoder is None else self._decoder.vae.sha256
        return {"generator": self.sha256, "vae": vae}


def _decoder(path: Path, vae: Path, trained_on: dict[str, str] | None, device: torch.device) -> Any:
    from diffratio_fast.data.latents import LatentDecoder

    decoder = LatentDecoder(vae, device=device)
    if trained_on and trained_on.get("sha256") and trained_on["sha256"] != decoder.vae.sha256:
        raise UserError(f"{vae}: not the VAE of the latents that {path} was trained on: {trained_on['name']}")
    return decoder
