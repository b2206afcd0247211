"""python -m diffratio_fast.pretrain [PRESET] [--option value ...]: a denoiser for ``train`` to start from."""

from __future__ import annotations

from typing import Any

from diffratio_fast import command
from diffratio_fast.config.presets import DEFAULT, PRETRAIN_PRESETS
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.training.beginning import Beginning
from diffratio_fast.training.command_line import act, chosen_options, over_preset, run_parser


def parser() -> command.Parser:
    description = (
        "Pre-train a denoiser by the objective of EDM, or of EDM2 where the backbone is EDM2's; "
        "python -m diffratio_fast.train PRESET --init RUN then starts from it."
    )
    return run_parser("pretrain", description, PretrainConfig, DEFAULT, PRETRAIN_PRESETS[DEFAULT])


def resolve(arguments: dict[str, Any]) -> tuple[str, PretrainConfig]:
    """The preset's name and the configuration: defaults, then preset, then --config, then options."""
    preset, chosen = chosen_options(arguments, PRETRAIN_PRESETS, PretrainConfig)
    return preset, PretrainConfig(**over_preset(PRETRAIN_PRESETS[preset], chosen))


def start(preset: str, config: PretrainConfig, beginning: Beginning) -> int:
    from diffratio_fast.training.denoiser_run import pretrain

    return pretrain(preset, config, beginning)


def main(argv: list[str]) -> int:
    return act(argv, parser(), resolve, start)


if __name__ == "__main__":
    command.run(main)
