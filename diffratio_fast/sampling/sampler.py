"""A trained generator as a source of images: (seed, numbers, labels) to uint8."""

from __future__ import annotations

import math
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffratio_fast import networks
from diffratio_fast.data.pictures import to_uint8
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.errors import UserError
from diffratio_fast.networks.from_checkpoint import load_average
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage import checkpoints
from diffratio_fast.storage.reading import DAMAGE, one_line
from diffratio_fast.storage.writing import sha256_of_file
from diffratio_fast.verifier.selection import LOWEST_SHARE, Verifier, effective_share, select


class Sampler:
    """The generator of a run directory or of a ``.safetensors`` file, and the decoding of its images.

    ``class_names``, ``scaling`` and ``about`` come from the metadata of the file. ``vae`` is the directory of
    the VAE that decodes latents; None for pixels.
    """

    def __init__(
        self, run: Path, *, device: torch.device, vae: Path | None = None, decode: bool = True
    ) -> None:
        """Without ``decode`` latents need no VAE until ``images`` is called."""
        paths = RunPaths(run)
        path = paths.generator if run.is_dir() else run
        if run.is_dir() and not paths.finished() and checkpoints.exists(paths.checkpoint):
            self.generator, self.about, path, self.sha256 = load_average(paths.checkpoint)
            print(f"{run}: not finished; using the average in checkpoint {path.name}", file=sys.stderr)
        elif run.is_dir() and not path.exists():
            raise UserError(
                f"{run}: holds no checkpoint and no generator.safetensors yet; train it, or name a snapshot"
            )
        else:
            self.generator, self.about = networks.load(path, "generator")
            self.sha256 = sha256_of_file(path)
        self.path = path
        self.generator.to(device)
        try:
            self.scaling = Scaling.parse(self.about.data["scaling"])
            self.class_names = [str(name) for name in self.about.data["class_names"]]
        except DAMAGE as error:
            raise UserError(
                f"{path}: damaged metadata of the data set ({one_line(error)}); restore the file"
            ) from None
        self._decoder = None
        if self.scaling.low is not None:
            if vae is not None:
                raise UserError(
                    f"--vae: {path} generates pixels; --vae needs a generator of latents; omit it"
                )
        elif vae is None:
            if decode:
                raise self._no_vae()
        else:
            self._decoder = _decoder(path, vae, self.about.data.get("vae"), device)

    def x0(self, seed: int, start: int, labels: Tensor) -> Tensor:
        """Samples ``start`` to ``start + N - 1`` of ``seed`` with labels int64 [N]: x0 [N, C, H, W].

        A sample is a function of (seed, number, label). Subclasses override this method to change the
        sampling (such as a choice among candidates) in all commands.
        """
        return networks.generate(self.generator, labels, seed, start)

    def _no_vae(self) -> UserError:
        return UserError(f"{self.path}: makes latents; name the VAE that decodes them with --vae DIR")

    def images(self, seed: int, start: int, labels: Tensor) -> Tensor:
        """Return the samples as uint8 [N, C, H, W] on the CPU, rounded to nearest; latents are decoded."""
        x0 = self.x0(seed, start, labels)
        if not (finite := torch.isfinite(x0).flatten(1).all(1)).all():
            number = start + int((~finite).nonzero()[0])
            raise UserError(
                f"{self.path}: image {number} of seed {seed} is not finite; the training diverged; use an "
                "earlier snapshot"
            )
        if self._decoder is None:
            if self.scaling.low is None:
                raise self._no_vae()
            return to_uint8(x0, self.scaling)
        return self._decoder.decode(self.scaling.to_records(x0.float()))

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        first = self.images(0, 0, torch.zeros(1, dtype=torch.int64))
        return first.shape[1], first.shape[2], first.shape[3]

    def identity(self) -> dict[str, Any]:
        """Everything that determines the images, except seed, number and label."""
        vae = None if self._decoder is None else self._decoder.vae.sha256
        return {"generator": self.sha256, "vae": vae}


class VerifiedSampler(Sampler):
    """Chooses each sample among ``candidates`` with the ratio network of ``refit``."""

    def __init__(
        self, run: Path, *, device: torch.device, vae: Path | None = None, candidates: int,
        how: str = "resample", sigma: float | None = None, draws: int = 16, verifier: Path | None = None,
        decode: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(run, device=device, vae=vae, decode=decode)
        path = verifier or RunPaths(run if run.is_dir() else run.parent).refitted
        if not path.exists():
            raise UserError(
                f"{path}: no such file; create the verifier with `python -m diffratio_fast.refit RUN`, or "
                "set "
                "--verifier to a ratio network and --sigma to its noise level"
            )
        ratio, about = networks.load(path, "ratio")
        if about.arguments.get("shape") != self.about.arguments.get("shape"):
            raise UserError(f"{path}: image shape does not match {run}; use the verifier of the same run")
        fitted, made = (found.training.get("step") for found in (about, self.about))
        if verifier is None and fitted != made:
            raise UserError(
                f"{path}: fitted to the generator of step {fitted}; this one is of step {made}; run "
                "`python -m diffratio_fast.refit` again"
            )
        if sigma is None:
            found = about.training.get("verifier")
            sigma = found.get("sigma") if isinstance(found, dict) else None
        if not (isinstance(sigma, float) and 0 < sigma < math.inf):
            raise UserError(
                f"{path}: refit found no noise level at which the verifier helps; set --sigma to use it "
                "anyway"
            )
        self.verifier = Verifier(ratio.to(device), sigma, how, draws)
        self.candidates = candidates
        self.verifier_sha256 = sha256_of_file(path)
        self._log_weights: list[Tensor] = []

    def x0(self, seed: int, start: int, labels: Tensor) -> Tensor:
        selection = select(self.verifier, self.generator, labels, seed, self.candidates, start)
        self._log_weights.append(selection.log_weights.cpu())
        return selection.images

    def identity(self) -> dict[str, Any]:
        tool = self.verifier
        return super().identity() | {
            "verifier": self.verifier_sha256, "candidates": self.candidates, "select": tool.how,
            "sigma": tool.sigma, "draws": tool.draws,
        }  # fmt: skip

    def print_effective_sample_size(self) -> None:
        """Print the effective sample size of this process for ``resample``; warn if it is too small."""
        if self.verifier.how != "resample" or not self._log_weights:
            return
        share = effective_share(torch.cat(self._log_weights))
        print(
            f"effective sample size {share * self.candidates:.2g} of {self.candidates} candidates "
            f"({share:.2f} N), at sigma {self.verifier.sigma:.3g}"
        )
        if share < LOWEST_SHARE:
            print(
                f"warning: the effective sample size is below {LOWEST_SHARE:g} N: a few candidates have all "
                "the weight, "
                "and the result depends on errors of the ratio network; use a larger --sigma"
            )


def _decoder(path: Path, vae: Path, trained_on: dict[str, str] | None, device: torch.device) -> Any:
    from diffratio_fast.data.latents import LatentDecoder

    decoder = LatentDecoder(vae, device=device)
    if trained_on and trained_on.get("sha256") and trained_on["sha256"] != decoder.vae.sha256:
        raise UserError(
            f"--vae {vae}: not the VAE of the training data of {path}; expected {trained_on['name']}"
        )
    return decoder
