"""The table of objectives: everything in the package that depends on ``--objective``.

A row names its classes and functions as "module:name", so that the command line reads the table without
torch. A new objective is one module and one row.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffratio_fast.config.options import flag
from diffratio_fast.errors import UserError

if TYPE_CHECKING:
    from diffratio_fast.config.train import TrainConfig


@dataclass(frozen=True)
class Objective:
    """One way to train a generator.

    The *online network* trains together with the generator: a ratio network, or a student denoiser.
    It is ``state.ratio`` and takes the options ``ratio_lr``, ``ratio_weight_decay``, ``ratio_noise``,
    ``ratio_steps`` and ``ratio_warmup_steps``.
    """

    title: str
    """Format string for plans, with fields of the configuration: "{divergence}, weight {weight}"."""
    step: str
    """Subclass of ``training.step.generator.Iteration``."""
    monitor: str
    """Subclass of ``training.monitor.Evaluation``."""
    label: str = "ratio network"
    """Name of the online network in plans and messages."""
    network: str = "diffratio_fast.training.state.builders:ratio_network"
    """Function (config, dataset) to the online network, without weights yet."""
    has_ratio: bool = True
    """Whether the online network is a log ratio at all noise levels: refit, verifier and report use it."""
    has_teacher: bool = False
    """Whether a frozen denoiser is used (``--teacher``)."""
    preset: Mapping[str, Any] = field(default_factory=dict)
    """Values that override those of every preset."""
    options: tuple[str, ...] = ()
    """Fields that only this objective (and others that list them) may change from their default."""
    requires: Mapping[str, Any] = field(default_factory=dict)
    """Fields that must have this value."""
    check: Callable[[TrainConfig], None] | None = None
    """Raises a ``UserError`` if other options are incompatible."""

    def load(self, name: str) -> Any:
        """The object that the field ``name`` refers to; imported at the first use."""
        module, _, attribute = getattr(self, name).partition(":")
        return getattr(importlib.import_module(module), attribute)


def _needs_teacher(config: TrainConfig) -> None:
    if config.teacher is None and config.init is None:
        raise UserError(
            f"--objective {config.objective} needs a denoiser to learn from: --teacher RUN, or --init RUN"
        )


def _needs_one_level(config: TrainConfig) -> None:
    """A GAN's loss softplus(-l) of the generator has the factor h = sigmoid(-l): softened_reverse_kl."""
    for law in config.noise_laws():
        if law.low != law.high:
            raise UserError(
                f"--objective gan is trained at one noise level: --ratio-noise 'fixed(0.05)', not {law.name}"
            )


_NO_RATIO: dict[str, Any] = {
    "divergence": "reverse_kl",
    "normalize_h": False,
    "ratio_roll_probability": 0.0,
    "ratio_gradient_penalty": 0.0,
    "ratio_ema_half_life_images": None,
    "ratio_matched_pairs": False,
    "ratio_loss_weight": "uniform",
}
"""What an objective without log ratio requires."""
_NO_RATIO_PRESET: dict[str, Any] = {
    "divergence": "reverse_kl",
    "weight": "sigma2",
    "ratio_ema_half_life_images": None,
    "ratio_weight_decay": 0.0,
}

OBJECTIVES: dict[str, Objective] = {
    "diffratio": Objective(
        title="{divergence}, weight {weight}, sigma {ratio_noise}",
        step="diffratio_fast.training.step.generator:Iteration",
        monitor="diffratio_fast.training.monitor:Evaluation",
    ),
    "vsd": Objective(
        title="score distillation, weight {weight}, sigma {ratio_noise}",
        step="diffratio_fast.training.step.vsd:VSDIteration",
        monitor="diffratio_fast.training.monitor_vsd:VSDEvaluation",
        label="student",
        network="diffratio_fast.training.state.builders:denoiser",
        has_ratio=False,
        has_teacher=True,
        preset=_NO_RATIO_PRESET,
        options=("teacher", "vsd_normalize", "stable_targets"),
        requires=_NO_RATIO,
        check=_needs_teacher,
    ),
    "conditional": Objective(
        title="conditional denoiser, weight {weight}, sigma {ratio_noise}",
        step="diffratio_fast.training.step.conditional:ConditionalIteration",
        monitor="diffratio_fast.training.monitor_vsd:VSDEvaluation",
        label="conditional denoiser",
        network="diffratio_fast.training.step.conditional:network",
        has_ratio=False,
        preset=_NO_RATIO_PRESET,
        options=("conditional_rate", "stable_targets"),
        requires=_NO_RATIO,
    ),
    "gan": Objective(
        title="non-saturating GAN, sigma {ratio_noise}",
        step="diffratio_fast.training.step.generator:Iteration",
        monitor="diffratio_fast.training.monitor:Evaluation",
        label="discriminator",
        preset={
            "divergence": "softened_reverse_kl",
            "weight": "uniform",
            "ratio_noise": "fixed(0.05)",
            "generator_noise": None,
        },
        requires={"divergence": "softened_reverse_kl", "weight": "uniform"},
        check=_needs_one_level,
    ),
}
"""Value of ``--objective`` to its row."""


def check_objective(config: TrainConfig) -> None:
    """Raise a ``UserError`` if the options are incompatible with the objective."""
    objective = OBJECTIVES[config.objective]
    for row in OBJECTIVES.values():
        for name in row.options:
            if name not in objective.options and getattr(config, name) != config.default(name):
                owners = [other for other, its in OBJECTIVES.items() if name in its.options]
                raise UserError(
                    f"{flag(name)} is an option of --objective {' or '.join(owners)} only, "
                    f"not of {config.objective}"
                )
    for name, value in objective.requires.items():
        if (found := getattr(config, name)) != value:
            wanted = "none" if value is None else value
            raise UserError(
                f"--objective {config.objective} requires {flag(name)} {wanted}, not {found}; change one of "
                "the two"
            )
    if objective.check is not None:
        objective.check(config)
