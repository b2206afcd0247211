"""The command line of ``train`` and ``pretrain``: presets, options, option files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from diffratio_fast import command, launch
from diffratio_fast.config.options import Options, add_options, preset_of, read_yaml
from diffratio_fast.config.presets import DESCRIPTIONS
from diffratio_fast.runs.loggers import parse_loggers
from diffratio_fast.training.beginning import Beginning, Source

EPILOG = """A run leaves its configuration, metrics, sample grids, checkpoints and networks in --run-dir. The
same command resumes an interrupted run; a finished run stays as it is. Exit status: 0 finished, 2 an error in
one line, 130 or 143 interrupted by SIGINT or SIGTERM after a save (0 under a launcher)."""
COMMON = (
    "config", "dry_run", "fresh", "resume", "run_dir", "device", "steps", "seed", "eval_every", "eval_images",
    "eval_features", "data", "class_conditional", "init", "generator", "ratio_network", "backbone", "width",
    "depth", "channel_mult", "batch_size", "micro_batch", "precision", "generator_lr", "ratio_lr", "lr",
    "divergence", "objective", "flip_probability", "help_all", "help",
)  # fmt: skip
"""Options that the short help shows."""


def run_parser(name: str, description: str, kind: type[Options], default: str, shown: Any) -> command.Parser:
    """The parser of ``python -m diffratio_fast.NAME``; the help shows the values ``shown``."""
    width = max(map(len, DESCRIPTIONS))
    presets = "\n".join(f"  {preset:{width}}  {text}" for preset, text in DESCRIPTIONS.items())
    result = command.Parser(
        prog=f"python -m diffratio_fast.{name}",
        usage=f"python -m diffratio_fast.{name} [PRESET] [--option value ...]",
        description=f"{description} In brackets: the values of the preset {default}.",
        epilog=f"presets:\n{presets}\n\n{EPILOG}",
        add_help=False,
    )
    result.add_argument("preset", nargs="?", default=default, metavar="PRESET", help="see the table below")
    result.add_argument(
        "-h",
        "--help",
        action=_BriefHelp,
        nargs=0,
        default=argparse.SUPPRESS,
        help="print the options most used",
    )
    result.add_argument("--help-all", action="help", help="print all options")
    result.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML file of options; command-line options override it"
    )
    result.add_argument(
        "--dry-run", action="store_true", help="print the plan of the run, including its memory, and exit"
    )
    result.add_argument(
        "--plan-memory", type=float, default=argparse.SUPPRESS, metavar="GIB",
        help="dry run: plan for a device with this memory instead of --device",
    )  # fmt: skip
    result.add_argument("--fresh", action="store_true", help="remove the existing run and start again")
    result.add_argument(
        "--resume-from", metavar="RUN@STEP",
        help="start a new run (in --run-dir) from a checkpoint of another run (without @STEP: the newest), "
        "with the options of that run, which options on the command line override",
    )  # fmt: skip
    result.add_argument(
        "--accept-data", action="store_true",
        help="resume with another data set than that of the checkpoint",
    )  # fmt: skip
    add_options(result, kind(**shown))
    return result


class _BriefHelp(argparse.Action):
    """Print the help of the ``COMMON`` options and exit."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        assert isinstance(parser, command.Parser)
        print(parser.brief_help(COMMON), end="")
        parser.exit()


def act(
    argv: list[str], parser: command.Parser, resolve: Callable[..., Any], train: Callable[..., int]
) -> int:
    """Run the command line: print the plan, or call ``train(preset, config, beginning)``."""
    rank, world_size = launch.process()
    try:
        arguments = vars(parser.parse_args(argv))
        dry_run, memory = arguments.pop("dry_run"), arguments.pop("plan_memory", None)
        beginning = _beginning(arguments)
        preset, config = resolve(arguments)
        parse_loggers(config.logger)
        if memory is not None and not memory > 0:
            raise command.UserError(f"--plan-memory {memory}: out of range; expected above 0")
        if config.batch_size % world_size:
            raise command.UserError(
                f"--batch-size {config.batch_size}: expected a multiple of the {world_size} processes"
            )
    except command.UserError:
        if rank:  # every process detects the same error
            raise command.ReportedElsewhere from None
        raise
    if not dry_run:
        return train(preset, config, beginning)
    # torch is imported only after the command line has been checked
    from diffratio_fast.training.plan import print_plan

    print_plan(preset, config, memory=memory)
    return 0


def _beginning(arguments: dict[str, Any]) -> Beginning:
    """The start of the run; the options of ``--resume-from``'s run replace those of --config."""
    fresh, accept, text = (arguments.pop(name) for name in ("fresh", "accept_data", "resume_from"))
    if text is None:
        return Beginning(fresh, accept)
    source = Source.parse(text)
    if "run_dir" not in arguments:
        raise command.UserError("--resume-from starts a new run: set its directory with --run-dir")
    file = source.require_config()
    if Path(arguments["run_dir"]).resolve() == source.run.resolve():
        raise command.UserError("--resume-from: --run-dir is the same run; choose another directory")
    if arguments["config"] is None:
        arguments["config"] = file
        arguments["preset"] = preset_of(file) or arguments["preset"]
    return Beginning(fresh, accept, source)


def chosen_options(arguments: dict[str, Any], presets: Mapping[str, Any], kind: type[Options]) -> Any:
    """(preset name, options of --config overridden by those of the command line)."""
    preset = arguments.pop("preset")
    if preset not in presets:
        known = command.did_you_mean(preset, presets) or f"; known: {', '.join(presets)}"
        raise command.UserError(f"no such preset: {preset}{known}")
    file = arguments.pop("config")
    return preset, ({} if file is None else read_yaml(kind, file)) | arguments


def over_preset(values: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """A preset's values overridden by the chosen options; another backbone drops its backbone options."""
    other = "backbone" in chosen and chosen["backbone"] != values.get("backbone")
    return {**values, **({"backbone_options": "{}"} if other else {}), **chosen}
