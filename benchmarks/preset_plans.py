"""The table of docs/presets.md: what every preset would take, from ``diffratio_fast.training.memory``.

    python -m benchmarks.preset_plans [PRESET ...]

Nothing is computed: steps run on tensors without numbers. Figures are those that ``--dry-run`` prints.
"""

from __future__ import annotations

from diffratio_fast import command
from diffratio_fast.config import PretrainConfig, RunConfig, TrainConfig
from diffratio_fast.presets import PRESETS, PRETRAIN_PRESETS
from diffratio_fast.training.memory import cost
from diffratio_fast.training.plan import planned_data

HEAD = """| preset | command | parameters, M | batch (part) | GFLOPs an image | memory, GiB | of that state |
|---|---|---|---|---|---|---|"""


def row(preset: str, config: RunConfig) -> str:
    found = cost(config, planned_data(preset, config)[0])
    parameters = " + ".join(f"{count / 1e6:.2f}" for count in found.parameters.values())
    size = f"{config.batch_size}" + (f" ({config.micro_batch})" if config.micro_batch else "")
    name = "train" if isinstance(config, TrainConfig) else "pretrain"
    state = (found.state + found.gradients) / 2**30
    return (
        f"| `{preset}` | `{name}` | {parameters} | {size} | {found.flops / config.batch_size / 1e9:,.2f} "
        f"| {found.peak / 2**30:.2f} | {state:.2f} |"
    )


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.preset_plans", description=__doc__)
    parser.add_argument("presets", nargs="*", metavar="PRESET", help="all, where none is named")
    presets = parser.parse_args(argv).presets or list(PRESETS)
    if unknown := sorted(set(presets) - set(PRESETS)):
        raise command.UserError(f"no such preset: {unknown[0]}; known: {', '.join(PRESETS)}")
    print(HEAD)
    for preset in presets:
        print(row(preset, PretrainConfig(**PRETRAIN_PRESETS[preset])), flush=True)
        print(row(preset, TrainConfig(**PRESETS[preset])), flush=True)
    return 0


if __name__ == "__main__":
    command.run(main)
