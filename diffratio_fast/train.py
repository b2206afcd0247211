"""python -m diffratio_fast.train [PRESET] [--option value ...]: train a one-step generator by DiffRatio."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffratio_fast import command
from diffratio_fast.config import TrainConfig, add_options, read_config
from diffratio_fast.presets import DEFAULT, DESCRIPTIONS, PRESETS, RATIO_NETWORKS

EPILOG = """A run leaves its configuration, metrics, sample grids, checkpoint and networks in
--run-dir. The same command continues a run that was stopped, by whatever; a finished run stays as it is."""


def parser() -> command.Parser:
    presets = "; ".join(f"{name}: {text}" for name, text in DESCRIPTIONS.items())
    result = command.Parser(
        prog="python -m diffratio_fast.train",
        usage="python -m diffratio_fast.train [PRESET] [--option value ...]",
        description="Train a one-step image generator by DiffRatio (arXiv 2502.08005). "
        f"In brackets: the values of the preset {DEFAULT}.",
        epilog=EPILOG,
        formatter_class=argparse.HelpFormatter,
    )
    result.add_argument("preset", nargs="?", default=DEFAULT, metavar="PRESET", help=f"{presets} [{DEFAULT}]")
    result.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; the command line's go before it"
    )
    result.add_argument("--dry-run", action="store_true", help="print the plan of the run and stop")
    result.add_argument("--fresh", action="store_true", help="start over: remove the run that is there")
    add_options(result, TrainConfig(**PRESETS[DEFAULT]))
    return result


def resolve(arguments: dict[str, Any]) -> tuple[str, TrainConfig]:
    """The preset's name and the configuration: defaults, then preset, then --config, then options."""
    preset = arguments.pop("preset")
    if preset not in PRESETS:
        raise command.UserError(f"no such preset: {preset}; known: {', '.join(PRESETS)}")
    file = arguments.pop("config")
    from_file = {} if file is None else read_config(file)
    chosen = from_file | arguments
    network = chosen.get("ratio_network", PRESETS[preset].get("ratio_network", "mlp"))
    return preset, TrainConfig(**(PRESETS[preset] | RATIO_NETWORKS.get((preset, network), {}) | chosen))


def main(argv: list[str]) -> int:
    arguments = vars(parser().parse_args(argv))
    dry_run, fresh = arguments.pop("dry_run"), arguments.pop("fresh")
    preset, config = resolve(arguments)
    # torch is imported only once the command line is known to be good
    if dry_run:
        from diffratio_fast.training.plan import print_plan

        print_plan(preset, config)
        return 0
    from diffratio_fast.training.loop import train

    return train(preset, config, fresh=fresh)


if __name__ == "__main__":
    command.run(main)
