"""Effect of a verifier: distance, precision and recall against the number of candidates.

    python -m benchmarks.studies.verifier_curve RUN [RUN ...] [--json FILE]

Each RUN is the directory of a finished run with a verifier of ``python -m diffratio_fast.refit``; several
runs have one configuration and different seeds. Both selections are measured for each number of candidates,
at the noise level of the refit or at ``--sigma``. Fréchet distance, precision and recall (3 neighbors) use
pixels and the test split; error bars are standard deviations over the runs.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import environment
from diffratio_fast import command, networks
from diffratio_fast.errors import UserError
from diffratio_fast.metrics.neighbors import neighbor_metrics
from diffratio_fast.metrics.pixels import to_pixels
from diffratio_fast.metrics.quality import Quality
from diffratio_fast.metrics.spaces import PixelSpace
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.verifier.finished_run import FinishedRun
from diffratio_fast.verifier.selection import SELECTIONS, Verifier, select

CANDIDATES = (1, 2, 4, 8, 16)
SAMPLES = 2_000
DRAWS = 16
SEED = 7
METRICS = ("frechet_distance", "precision", "recall", "effective_share")


def measure(run: FinishedRun, sigma: float | None) -> list[dict[str, Any]]:
    """Measure one row per selection and number of candidates."""
    network, about = networks.load(run.directory.refitted, "ratio")
    level = about.training["verifier"]["sigma"] if sigma is None else sigma
    if level is None:
        raise UserError(f"{run.directory.root}: its refit chose no noise level; give one with --sigma")
    metrics = Quality(run.dataset, PixelSpace(run.dataset))
    real = metrics.split("test")[0][:SAMPLES]
    labels = metrics.labels("test", SAMPLES)
    rows = []
    for how in SELECTIONS:
        tool = Verifier(network.to(run.device), level, how, DRAWS)
        for candidates in CANDIDATES:
            selection = select(tool, run.generator, labels, SEED, candidates)
            figures = neighbor_metrics(to_pixels(run.dataset, selection.images), real)
            row = {
                "run_seed": run.config.seed,
                "select": how,
                "candidates": candidates,
                "sigma": level,
                "frechet_distance": metrics.distance(selection.images, "test"),
                "precision": figures.precision,
                "recall": figures.recall,
                # the spread of l is not a spread of weights
                "effective_share": selection.effective_share if how == "resample" else None,
            }
            print(row, flush=True)
            rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown: mean and standard deviation over the runs."""
    lines = [
        "| selection | N | Fréchet distance | precision | recall | effective sample size |",
        "|---|---|---|---|---|---|",
    ]
    for how in SELECTIONS:
        for candidates in CANDIDATES:
            group = [row for row in rows if row["select"] == how and row["candidates"] == candidates]
            cells = []
            for name, digits in zip(METRICS, (3, 3, 3, 2), strict=True):
                values = [row[name] for row in group if row[name] is not None]
                spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
                unit = " N" if name == "effective_share" else ""
                cells.append(f"{statistics.mean(values):.{digits}f}{spread}{unit}" if values else "")
            lines.append(f"| `{how}` | {candidates} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.studies.verifier_curve", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--sigma", type=float, help="noise level (default: chosen by the refit)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    arguments = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    runs = [FinishedRun(path, device) for path in arguments.runs]
    rows = [row for run in runs for row in measure(run, arguments.sigma)]
    if arguments.json is not None:
        content = {
            "environment": environment(device),
            "data": runs[0].dataset.name,
            "samples": SAMPLES,
            "draws": DRAWS,
            "rows": rows,
        }
        replace_file(arguments.json, json.dumps(content, indent=1) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    command.run(main)
