"""python -m diffratio_fast.train [PRESET] [--option value ...]: train a one-step generator by DiffRatio."""

from __future__ import annotations

from typing import Any

from diffratio_fast import command
from diffratio_fast.config.objectives import OBJECTIVES
from diffratio_fast.config.presets import DEFAULT, PRESETS, RATIO_NETWORKS
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.training.beginning import Beginning
from diffratio_fast.training.command_line import act, chosen_options, over_preset, run_parser


def parser() -> command.Parser:
    description = "Train a one-step image generator by DiffRatio (arXiv 2502.08005)."
    return run_parser("train", description, TrainConfig, DEFAULT, PRESETS[DEFAULT])


def resolve(arguments: dict[str, Any]) -> tuple[str, TrainConfig]:
    """Preset name and configuration; each overrides the previous: defaults, preset, --config, options."""
    preset, chosen = chosen_options(arguments, PRESETS, TrainConfig)
    network = chosen.get("ratio_network", PRESETS[preset].get("ratio_network", "mlp"))
    values = PRESETS[preset] | RATIO_NETWORKS.get((preset, network), {})
    objective = OBJECTIVES.get(chosen.get("objective", TrainConfig.default("objective")))
    if objective is not None:
        values = {**values, **objective.preset}
    return preset, TrainConfig(**over_preset(values, chosen))


def start(preset: str, config: TrainConfig, beginning: Beginning) -> int:
    from diffratio_fast.training.generator_run import train

    return train(preset, config, beginning)


def main(argv: list[str]) -> int:
    return act(argv, parser(), resolve, start)


if __name__ == "__main__":
    command.run(main)
