"""python -m diffratio_fast.pretrain [PRESET] [--option value ...]: train a denoiser for ``train --init``."""

from __future__ import annotations

from typing import Any

from diffratio_fast import command
from diffratio_fast.config.presets import DEFAULT, PRETRAIN_PRESETS
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.training.beginning import Beginning
from diffratio_fast.training.command_line import act, chosen_options, over_preset, run_parser


def parser() -> command.Parser:
    description = (
        "Pre-train a denoiser with the objective of EDM, or of EDM2 for an EDM2 backbone. "
        "python -m diffratio_fast.train PRESET --init RUN starts from it."
    )
    return run_parser("pretrain", description, PretrainConfig, DEFAULT, PRETRAIN_PRESETS[DEFAULT])


def resolve(arguments: dict[str, Any]) -> tuple[str, PretrainConfig]:
    """Preset name and configuration; each overrides the previous: defaults, preset, --config, options."""
    preset, chosen = chosen_options(arguments, PRETRAIN_PRESETS, PretrainConfig)
    return preset, PretrainConfig(**over_preset(PRETRAIN_PRESETS[preset], chosen))


def start(preset: str, config: PretrainConfig, beginning: Beginning) -> int:
    from diffratio_fast.training.denoiser_run import pretrain

    return pretrain(preset, config, beginning)


def main(argv: list[str]) -> int:
    return act(argv, parser(), resolve, start)


if __name__ == "__main__":
    command.run(main)
