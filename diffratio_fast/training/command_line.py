"""The command line of ``train`` and ``pretrain``: presets, options, files of options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffratio_fast import command, launch
from diffratio_fast.config.options import Options, add_options, read_yaml
from diffratio_fast.config.presets import DESCRIPTIONS

EPILOG = """A run leaves its configuration, metrics, sample grids, checkpoint and networks in
--run-dir. The same command continues a run that was stopped, by whatever; a finished run stays as it is."""


def run_parser(name: str, description: str, kind: type[Options], default: str, shown: Any) -> command.Parser:
    """The parser of ``python -m diffratio_fast.NAME``; the help shows the values ``shown``."""
    presets = "; ".join(f"{preset}: {text}" for preset, text in DESCRIPTIONS.items())
    result = command.Parser(
        prog=f"python -m diffratio_fast.{name}",
        usage=f"python -m diffratio_fast.{name} [PRESET] [--option value ...]",
        description=f"{description} In brackets: the values of the preset {default}.",
        epilog=EPILOG,
        formatter_class=argparse.HelpFormatter,
    )
    result.add_argument("preset", nargs="?", default=default, metavar="PRESET", help=f"{presets} [{default}]")
    result.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; the command line's go before it"
    )
    result.add_argument(
        "--dry-run", action="store_true", help="print the plan of the run, with its memory, and stop"
    )
    result.add_argument(
        "--plan-memory", type=float, default=argparse.SUPPRESS, metavar="GIB",
        help="dry run: plan for a device with so much memory, in place of --device",
    )  # fmt: skip
    result.add_argument("--fresh", action="store_true", help="start over: remove the run that is there")
    add_options(result, kind(**shown))
    return result


def act(
    argv: list[str], parser: command.Parser, resolve: Callable[..., Any], train: Callable[..., int]
) -> int:
    """Do what the command line asks for: print the plan, or ``train(preset, config, fresh=...)``."""
    rank, world_size = launch.process()
    try:
        arguments = vars(parser.parse_args(argv))
        dry_run, fresh = arguments.pop("dry_run"), arguments.pop("fresh")
        memory = arguments.pop("plan_memory", None)
        preset, config = resolve(arguments)
        if memory is not None and not memory > 0:
            raise command.UserError(f"--plan-memory must be above 0, not {memory}")
        if config.batch_size % world_size:
            raise command.UserError(
                f"--batch-size {config.batch_size} cannot be shared out equally among {world_size} processes"
            )
    except command.UserError:
        if rank:  # every process finds the same fault with its options
            raise command.ReportedElsewhere from None
        raise
    if not dry_run:
        return train(preset, config, fresh=fresh)
    # torch is imported only once the command line is known to be good
    from diffratio_fast.training.plan import print_plan

    print_plan(preset, config, memory=memory)
    return 0


def chosen_options(arguments: dict[str, Any], presets: Mapping[str, Any], kind: type[Options]) -> Any:
    """(the preset's name, the options from --config and, before them, the command line)."""
    preset = arguments.pop("preset")
    if preset not in presets:
        raise command.UserError(f"no such preset: {preset}; known: {', '.join(presets)}")
    file = arguments.pop("config")
    return preset, ({} if file is None else read_yaml(kind, file)) | arguments


def over_preset(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values under the options chosen; those of its backbone go with it."""
    other = "backbone" in chosen and chosen["backbone"] != values.get("backbone")
    return {**values, **({"backbone_options": "{}"} if other else {}), **chosen}
