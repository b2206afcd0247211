"""A finished run: its networks, its data, and measurements after training."""

from __future__ import annotations

from collections.abc import Generator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from diffratio_fast import networks, ops
from diffratio_fast.config.options import read_yaml
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet
from diffratio_fast.data.scaling import to_model
from diffratio_fast.errors import UserError
from diffratio_fast.objectives.augmentation import flip
from diffratio_fast.runs.directory import RunDirectory
from diffratio_fast.verifier.calibration import Calibration, calibrate

CALIBRATION_SEED = 20_240_217
HELD_OUT = 4096
"""Maximum number of validation images to use."""


class FinishedRun:
    """The averaged generator and the ratio networks of a run, on a device, with its data and noise law."""

    def __init__(self, root: Path, device: torch.device) -> None:
        self.directory, self.device = RunDirectory(root), device
        if not root.is_dir():
            raise UserError(f"{root}: no such run directory; expected the directory of a finished run")
        if not self.directory.config.exists():
            raise UserError(
                f"{root}: no config.yaml; expected the directory of a finished run; finish the training first"
            )
        self.config = TrainConfig(**read_yaml(TrainConfig, self.directory.config))
        if not self.config.row.has_ratio:
            raise UserError(
                f"{root}: --objective {self.config.objective} has no ratio network; use a run of another "
                "objective"
            )
        for path in (self.directory.generator, self.directory.ratio):
            if not path.exists():
                raise UserError(f"{root}: holds no {path.name}; finish its training first")
        self.law, _ = self.config.noise_laws()
        self.generator, _ = self._load(self.directory.generator, "generator")
        self.ratio, self.about_ratio = self._load(self.directory.ratio, "ratio")

    def _load(self, path: Path, role: str) -> tuple[nn.Module, networks.SavedNetwork]:
        network, about = networks.load(path, role)
        return network.to(self.device).requires_grad_(False), about

    @cached_property
    def dataset(self) -> DataSet:
        return open_dataset(
            self.config.data, loader=self.config.loader, verify=self.config.verify,
            device=self.device, class_conditional=self.config.class_conditional,
        )  # fmt: skip

    def _to_device(
        self, batch: tuple[Tensor, Tensor], seed: int = CALIBRATION_SEED, number: int = 0
    ) -> tuple[Tensor, Tensor]:
        """(x0, labels) on the device; latents are drawn with (seed, number)."""
        records, labels = (tensor.to(self.device) for tensor in batch)
        rng = ops.make_rng(seed, number, self.device)
        index = torch.arange(len(labels), device=self.device)
        x0 = to_model(self.dataset.scaling, records, rng, index)
        return x0.to(next(self.ratio.parameters()).dtype), labels

    def split(self, name: str) -> tuple[Tensor, Tensor]:
        """(x0, labels) of the first ``HELD_OUT`` records of a split, on the device."""
        return self._to_device(self.dataset.first(name, HELD_OUT))

    def require_validation(self) -> None:
        """Raise ``UserError`` if the data set has no validation split."""
        if self.dataset.count("validation") < 2:
            raise UserError(
                f"--data {self.config.data}: no validation split; prepare the data set with --validation"
            )

    def batches(self, batch_size: int, seed: int) -> Generator[tuple[Tensor, Tensor]]:
        """Infinite (x0, labels) of the training split, flipped as in training; close it after use."""
        source = self.dataset.batches("train", batch_size, seed=seed)
        try:
            for number, batch in enumerate(source):
                x0, labels = self._to_device(batch, seed, number)
                rng = ops.make_rng(seed, number, self.device)
                index = torch.arange(len(labels), device=self.device)
                yield flip(x0, rng, index, self.config.flip_probability), labels
        finally:
            if isinstance(source, Generator):
                source.close()

    def calibrations(
        self, sigmas: list[float], *, refitted: nn.Module | None = None
    ) -> dict[str, list[Calibration]]:
        """Calibration on the validation split of the run's ratio networks: online, average, refitted.

        Networks that the run directory does not have are skipped; ``refitted`` overrides the stored one.
        """
        real, labels = self.split("validation")
        found = {"online": self.ratio}
        if self.directory.ratio_average.exists():
            found["average"], _ = self._load(self.directory.ratio_average, "ratio")
        if refitted is not None:
            found["refitted"] = refitted
        elif self.directory.refitted.exists():
            found["refitted"], _ = self._load(self.directory.refitted, "ratio")
        return {
            name: calibrate(network, self.generator, real, labels, sigmas, seed=CALIBRATION_SEED)
            for name, network in found.items()
        }
