"""The configuration of a training run: one dataclass, from which options, YAML and checks all derive."""

from __future__ import annotations

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from diffratio_fast.command import Parser, UserError

GROUPS = {
    "run": "the run",
    "data": "data",
    "networks": "networks",
    "optimization": "optimization",
    "objective": "objective",
    "augmentation": "augmentation",
}


def option(
    default: Any,
    help: str,
    group: str,
    *,
    choices: tuple[str, ...] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    free: bool = False,
) -> Any:
    """A field with its help, its bounds (``above`` is exclusive) and whether it may change on continuing."""
    metadata = {
        "help": help,
        "group": group,
        "choices": choices,
        "low": low,
        "high": high,
        "above": above,
        "free": free,
    }
    return dataclasses.field(default=default, metadata=metadata)


DIVERGENCE_NAMES = (
    "reverse_kl",
    "jensen_shannon",
    "softened_reverse_kl",
    "forward_kl",
    "squared_hellinger",
    "jeffreys",
)
WEIGHT_NAMES = ("uniform", "sigma", "sigma2", "bounded", "dmd")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides a training run; ``free`` fields do not alter the training of a given step."""

    run_dir: str | None = option(None, "where the run lives (default: runs/PRESET)", "run", free=True)
    device: str = option("auto", "auto, cpu, cuda or cuda:N", "run", free=True)
    threads: int | None = option(
        None,
        "CPU threads (default: torch's choice); results are bit-identical only at equal thread counts",
        "run",
        low=1,
        free=True,
    )
    seed: int = option(0, "seed of all randomness", "run", low=0, high=2**63 - 1)
    steps: int = option(8000, "training steps (generator updates)", "run", low=1, high=2**32 - 1, free=True)
    log_every: int = option(100, "steps between lines of metrics.jsonl", "run", low=1, free=True)
    eval_every: int = option(
        1000, "steps between evaluations on the validation split and sample grids", "run", low=1, free=True
    )
    checkpoint_every: int = option(1000, "steps between checkpoints", "run", low=1, free=True)
    snapshot_every: int = option(
        4000, "steps between snapshots of the EMA generator", "run", low=1, free=True
    )

    refit_steps: int = option(
        200,
        "steps at most for which an evaluation refits a copy of the ratio network to tell the divergence; "
        "0: none",
        "run",
        low=0,
        free=True,
    )

    data: str = option("digits", "data set: digits, or the directory of a prepared one", "data")
    loader: str = option(
        "native",
        "how prepared data are read; the batches are the same",
        "data",
        choices=("native", "dali"),
        free=True,
    )
    verify: str = option(
        "first_epoch",
        "which records of prepared data are hashed while read",
        "data",
        choices=("always", "first_epoch", "never"),
        free=True,
    )

    init: str | None = option(
        None, "start from the networks of a run directory, or from one generator.safetensors", "networks"
    )
    generator: str = option("mlp", "architecture of the generator", "networks", choices=("mlp",))
    generator_width: int = option(256, "features of the generator's hidden layers", "networks", low=1)
    generator_depth: int = option(3, "hidden layers of the generator", "networks", low=1)
    latent_size: int = option(64, "numbers in a latent", "networks", low=1)
    ratio_network: str = option(
        "mlp", "architecture of the ratio network", "networks", choices=("mlp", "mixer")
    )
    ratio_width: int = option(256, "features of the ratio network's hidden layers", "networks", low=1)
    ratio_depth: int = option(4, "residual blocks of the ratio network", "networks", low=1)

    ratio_expansion: int = option(2, "mixer: hidden units per feature", "networks", low=1)
    ratio_patch: int | None = option(
        None, "mixer: pixels along a patch (default: from 2 on, at most 256 patches)", "networks", low=1
    )

    batch_size: int = option(128, "images per step", "optimization", low=1)
    optimizer: str = option("adamw", "optimizer of both networks", "optimization", choices=("adamw", "adam"))
    generator_lr: float = option(1e-3, "learning rate of the generator", "optimization", low=0)
    ratio_lr: float = option(2e-3, "learning rate of the ratio network", "optimization", low=0)
    lr_schedule: str = option(
        "constant",
        "learning rates over the run: constant, or falling to lr_final",
        "optimization",
        choices=("constant", "linear", "cosine"),
    )
    lr_final: float = option(
        0.0,
        "share of the learning rates left at the end of a linear or cosine schedule",
        "optimization",
        low=0,
        high=1,
    )
    lr_warmup_steps: int = option(
        0, "steps over which both learning rates rise at the start", "optimization", low=0
    )
    beta1: float = option(0.0, "Adam's first-moment decay", "optimization", low=0, high=0.99999)
    beta2: float = option(0.99, "Adam's second-moment decay", "optimization", low=0, high=0.999999)
    generator_weight_decay: float = option(0.0, "weight decay of the generator", "optimization", low=0)
    ratio_weight_decay: float = option(
        0.0, "weight decay of the ratio network: an option that small data need", "optimization", low=0
    )
    ema_half_life_images: float = option(
        44_000.0, "half-life of the generator's moving average, in images", "optimization", low=0
    )
    ema_rampup_ratio: float | None = option(
        0.1, "the half-life is at most this share of the images seen; none: no ramp", "optimization", above=0
    )
    ratio_ema_half_life_images: float | None = option(
        None,
        "half-life of a moving average of the ratio network, in images; none: keep none",
        "optimization",
        above=0,
    )
    precision: str = option(
        "float32",
        "float32, float64, or bfloat16 autocast of the networks",
        "optimization",
        choices=("float32", "bfloat16", "float64"),
    )
    compile: bool = option(False, "compile the networks with torch.compile", "optimization")

    divergence: str = option(
        "reverse_kl", "divergence that the generator descends", "objective", choices=DIVERGENCE_NAMES
    )
    weight: str = option(
        "sigma2", "weight w(sigma) of the generator's gradient", "objective", choices=WEIGHT_NAMES
    )
    ratio_noise: str = option("loguniform(0.07, 1.3)", "law of sigma for the ratio network", "objective")
    generator_noise: str | None = option(
        None, "law of sigma for the generator (default: the ratio network's)", "objective"
    )
    noise_draws: int = option(
        1, "noise levels per image in a generator step", "objective", low=1, high=2**16 - 1
    )
    ratio_steps: int = option(1, "ratio-network updates per generator update", "objective", low=1, high=255)
    ratio_warmup_steps: int = option(
        0, "first steps, in which only the ratio network learns", "objective", low=0
    )
    generator_ramp_steps: int = option(
        0, "steps over which the generator's learning rate then rises", "objective", low=0
    )
    normalize_h: bool = option(
        False, "divide the divergence's factor h by its running mean per noise-level bin", "objective"
    )

    flip_probability: float = option(0.0, "horizontal flips of the data", "augmentation", low=0, high=1)
    ratio_roll_probability: float = option(
        0.0,
        "cyclic shifts of the ratio network's input, the same for real and fake",
        "augmentation",
        low=0,
        high=1,
    )
    ratio_roll_reach: int = option(1, "largest such shift, in pixels", "augmentation", low=1)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check(field, getattr(self, field.name))


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    rule = field.metadata
    name = field.name
    if rule["choices"] and value not in rule["choices"]:
        raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, not {value!r}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise UserError(f"{name} must be finite, not {value}")
    if rule["low"] is not None and value < rule["low"]:
        raise UserError(f"{name} must be at least {rule['low']}, not {value}")
    if rule["above"] is not None and value <= rule["above"]:
        raise UserError(f"{name} must be above {rule['above']}, not {value}")
    if rule["high"] is not None and value > rule["high"]:
        raise UserError(f"{name} must be at most {rule['high']}, not {value}")


def _types() -> dict[str, tuple[type, bool]]:
    """Field name to (its type, whether None is allowed)."""
    result = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = (part for part in parts if part is not type(None))
        result[name] = (kind, type(None) in parts)
    return result


def _convert(name: str, value: Any) -> Any:
    """A YAML value as the field's type; a value of another type is a ``UserError``."""
    kind, optional = _types()[name]
    if value is None and optional:
        return None
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{name} must be of type {kind.__name__}, not {value!r}")


def from_mapping(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked and converted configuration values; an unknown key is a ``UserError`` that names it."""
    known = _types()
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {key!r}")
    try:
        return {key: _convert(key, value) for key, value in values.items()}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_config(path: Path) -> dict[str, Any]:
    """A YAML file's configuration values; ``preset`` and a run's ``environment`` section are passed over."""
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping of option names to values")
    values = {str(key): value for key, value in content.items() if key not in ("preset", "environment")}
    return from_mapping(values, str(path))


def add_options(parser: Parser, shown: TrainConfig) -> None:
    """An option for every field of ``TrainConfig``; one that is not given is absent from the result.

    The help shows the values of ``shown``.
    """
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    kinds = _types()
    for field in dataclasses.fields(TrainConfig):
        kind, optional = kinds[field.name]
        default = getattr(shown, field.name)
        arguments: dict[str, Any] = {
            "dest": field.name,
            "default": argparse.SUPPRESS,
            "help": field.metadata["help"] + ("" if default is None else f" [{default}]"),
        }
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = _optional(kind) if optional and kind is not str else kind
            if field.metadata["choices"]:
                arguments["choices"] = field.metadata["choices"]
            else:
                arguments["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
        groups[field.metadata["group"]].add_argument("--" + field.name.replace("_", "-"), **arguments)


def _optional(kind: type) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse names it in its error
    return parse


def changed_fields(old: TrainConfig, new: TrainConfig) -> Iterable[str]:
    """Names of the fields that decide the training and differ."""
    for field in dataclasses.fields(TrainConfig):
        if not field.metadata["free"] and getattr(old, field.name) != getattr(new, field.name):
            yield field.name
