"""The table of kinds of run: configuration class to run class."""

from __future__ import annotations

from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.run import RunConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.run import Run

KINDS: dict[type[RunConfig], type[Run]] = {TrainConfig: Trainer, PretrainConfig: Pretrainer}
