"""python -m diffratio_fast.average RUN --ema-std X --out FILE: an average of any width, after the run.

A run with ``--posthoc-ema 0.05,0.10`` saves power-function averages of those widths with its snapshots. This
command combines them by least squares into an average of another width (Karras et al. 2024, Section 3).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio_fast import command
from diffratio_fast.config.run import LARGEST_WIDTH
from diffratio_fast.errors import UserError
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import require_regular

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

GOOD = 0.05
"""Maximum relative error of the profile without a warning."""


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.average",
        description="Compute a weight average of any width from the averages of a --posthoc-ema run. The "
        "output is a generator file for sample, evaluate and --init, or a denoiser file for a run of "
        "pretrain.",
    )
    add = result.add_argument
    add("run", type=Path, metavar="RUN", help="run directory")
    add(
        "--ema-std", type=float, required=True, metavar="X",
        help="relative width of the average: its standard deviation as a fraction of the training time",
    )  # fmt: skip
    add("--step", type=int, metavar="N", help="training step of the snapshot (default: the last)")
    add("--out", type=Path, required=True, metavar="FILE", help=".safetensors file to write")
    return result


@dataclass(frozen=True)
class Snapshot:
    """The file of a saved average: its width, its number of updates, and its training step."""

    path: Path
    std: float
    updates: int
    step: int
    metadata: dict[str, str]


def snapshots(run: Path) -> list[Snapshot]:
    """The saved averages of a run, earliest first; raises ``UserError`` if none exist or one is damaged."""
    from safetensors import SafetensorError, safe_open

    if not run.is_dir():
        raise UserError(f"{run}: no such run directory; expected the directory of a run")
    found = []
    for path in RunPaths(run).kept_averages():
        try:
            require_regular(path)
            with safe_open(path, "pt") as file:
                metadata = dict(file.metadata() or {})
            about = metadata if "architecture" in metadata else json.loads(metadata["about"])["training"]
            std, updates, step = (about[name] for name in ("ema_std", "ema_updates", "step"))
            found.append(Snapshot(path, float(std), int(updates), int(step), metadata))
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise UserError(f"{path}: damaged or not a saved average ({error}); remove the file") from None
    if not found:
        raise UserError(f"{run}: no saved averages; train with --posthoc-ema 0.05,0.10")
    return sorted(found, key=lambda snapshot: (snapshot.step, snapshot.std))


def combined(chosen: list[Snapshot], weights: npt.NDArray[Any]) -> dict[str, torch.Tensor]:
    """Weighted sum of the tensors of the files, in float64, with one tensor in memory at a time.

    Tensors that are equal in all files (not trained) are unchanged.
    """
    import torch
    from safetensors import safe_open

    files = [safe_open(snapshot.path, "pt") for snapshot in chosen]
    names = set(files[0].keys())
    for file, snapshot in zip(files, chosen, strict=True):
        if set(file.keys()) != names:
            raise UserError(f"{snapshot.path}: belongs to another network than {chosen[0].path}")
    result = {}
    for name in sorted(names):
        last = files[-1].get_tensor(name)
        total, same = torch.zeros_like(last, dtype=torch.float64), True
        for file, weight in zip(files, weights, strict=True):
            tensor = file.get_tensor(name)
            if tensor.shape != last.shape:
                raise UserError(f"{chosen[0].path}: belongs to another network than {chosen[-1].path}")
            same = same and torch.equal(tensor, last)
            total += weight * tensor.double()
        keep = torch.float32 if last.dtype in (torch.float16, torch.bfloat16) else last.dtype
        result[name] = last.to(keep) if same else total.to(keep)
    return result


def described(last: Snapshot, std: float) -> dict[str, str]:
    """Metadata for the file of an average of width ``std`` at the last snapshot."""
    if "architecture" in last.metadata:
        return last.metadata | {"ema_std": str(std)}
    about = json.loads(last.metadata["about"])
    about["training"]["ema_std"] = std
    return last.metadata | {"about": json.dumps(about)}


def average(run: Path, std: float, out: Path, step: int | None = None) -> float:
    """Write the average of width ``std`` at ``step`` (default: the last); return the profile error."""
    from diffratio_fast.storage.tensors import save_tensors
    from diffratio_fast.training.state.posthoc_ema import Profile, combination

    if not 0 < std <= LARGEST_WIDTH:
        raise UserError(f"--ema-std {std}: out of range; expected above 0 and at most {LARGEST_WIDTH}")
    if out.suffix != ".safetensors" or not out.parent.is_dir():
        raise UserError(f"--out {out}: expected a .safetensors file in an existing directory")
    found = snapshots(run)
    steps = sorted({snapshot.step for snapshot in found})
    if step is not None and step not in steps:
        raise UserError(
            f"--step {step}: {run} has no averages at this step; expected one of {', '.join(map(str, steps))}"
        )
    chosen = [snapshot for snapshot in found if step is None or snapshot.step <= step]
    profiles = [Profile(snapshot.std, snapshot.updates) for snapshot in chosen]
    weights, error = combination(profiles, Profile(std, chosen[-1].updates))
    save_tensors(out, combined(chosen, weights), described(chosen[-1], std))
    print(
        f"{out}: average of relative width {std:g} at step {chosen[-1].step:,}, from {len(chosen)} saved "
        f"averages; relative error of the profile {error:.1%}"
    )
    if error > GOOD:
        print(
            f"warning: the error is above {GOOD:.0%}; use more snapshots, or a width between the saved ones"
        )
    return error


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    average(arguments.run, arguments.ema_std, arguments.out, arguments.step)
    return 0


if __name__ == "__main__":
    command.run(main)
