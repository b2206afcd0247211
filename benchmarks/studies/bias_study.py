"""Errors of score differences: the gradient of a ratio network against the difference of two denoisers.

    python -m benchmarks.studies.bias_study [--json FILE] [--images DIRECTORY] [--only PART ...] [--scale X]

Data and generators are mixtures of Gaussians, so noised densities and scores are known. All networks are
residual networks with equal numbers of parameters; each is trained several times with different seeds, in one
batch. Parts:

- ``settings``: thirteen data sets and sizes, methods with rates chosen on other data, distance at the end;
- ``scores``: a frozen generator; error of the score difference at each noise level, as a cosine and a
  relative error with its squared bias (mean over trainings) and variance;
- ``training``: generators trained to the end in 2, 16 and 64 dimensions; their exact distance against steps;
- ``knobs``: the same in 16 dimensions with one setting changed at a time;
- ``switches``: shared noise, energy head, matched pairs and ratio steps, one after another, and stable
  targets of score distillation, in 16 and 64 dimensions.

This command writes the figures and tables of docs/bias_study.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies import bias_figures, bias_settings
from benchmarks.studies.bias_parts import PAIRS, STEPS, Row, Study, weighted_errors
from benchmarks.studies.figures import Figures
from diffratio_fast import command
from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import replace_file

PARTS = ("settings", "scores", "training", "knobs", "switches")


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.studies.bias_study", description=__doc__)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument(
        "--images", type=Path, metavar="DIRECTORY", help="write the figures to this directory"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="fraction of the steps, for a short test"
    )
    options = parser.parse_args(argv)
    if not 0 < options.scale <= 1:
        raise UserError(f"--scale {options.scale}: out of range; expected above 0 and at most 1")
    figures = None if options.images is None else Figures(options.images)
    torch.set_num_threads(1)
    study = Study(options.scale)
    found: dict[str, Any] = {"torch": torch.__version__, "seeds": study.seeds, "steps": study.steps(STEPS)}
    if options.json is not None and options.json.exists():  # keep the parts that are not recomputed
        found = json.loads(options.json.read_text()) | found
    for part in options.only:
        began = time.process_time()
        rows: list[Row] = []
        sources: dict[str, tuple[Callable[[], Iterator[Row]], ...]] = {
            "settings": (lambda: bias_settings.settings(study),),
            "scores": (study.scores, study.few_data),
            "training": (study.training,),
            "knobs": (study.knobs,),
            "switches": (study.switches,),
        }
        for source in sources[part]:
            for row in source():
                rows.append(row)
                found[part] = rows
                if options.json is not None:  # an interrupted study keeps what it has
                    replace_file(options.json, json.dumps(bias_figures.rounded(found)) + "\n")
                if part != "scores":
                    print(bias_figures.one_line(row), flush=True)
        found[f"{part}_seconds"] = round(time.process_time() - began)
        if part == "scores":
            found["weights"] = [row for pair in PAIRS for row in weighted_errors(rows, pair)]
        print(f"{part}: {found[f'{part}_seconds']} s of one core", flush=True)
    if options.json is not None:
        replace_file(options.json, json.dumps(bias_figures.rounded(found)) + "\n")
    print(bias_figures.tables(found))
    if figures is not None:
        bias_figures.draw(found, figures)
    return 0


if __name__ == "__main__":
    command.run(main)
