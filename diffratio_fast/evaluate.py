"""python -m diffratio_fast.evaluate SUBJECT: metrics of generated images against real ones."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffratio_fast import command, report
from diffratio_fast.errors import UserError
from diffratio_fast.runs.measurements import keep_evaluation
from diffratio_fast.runs.paths import DEFAULT_RUN, RunPaths
from diffratio_fast.storage.reading import UNPACKED_LIMIT

if TYPE_CHECKING:
    from diffratio_fast.metrics.protocol import Options

EPILOG = """The default is the protocol of published results: 50,000 images for each of three seeds, as uint8,
against the training split; the mean over the seeds and the best value are printed. See docs/evaluation.md."""


def parser() -> command.Parser:
    result = command.Parser(
        prog="python -m diffratio_fast.evaluate",
        description="Measure generated images against real ones: Fréchet and kernel distance, precision, "
        "recall, density, coverage, classifier score, class accuracy.",
        epilog=EPILOG,
    )
    add = result.add_argument
    add(
        "subject", type=Path, nargs="?", default=DEFAULT_RUN, metavar="SUBJECT",
        help="run directory, a generator's .safetensors, a folder of images, or an .npz of images",
    )  # fmt: skip
    add(
        "--reference", metavar="REF",
        help="data set, or statistics: an .npz (--save-reference, EDM's) or .pkl (EDM2's) "
        "(default: the data set that the run was trained on)",
    )  # fmt: skip
    add("--split", default="train", choices=("train", "validation", "test"), help="of the reference data set")
    add(
        "--features", default="auto", metavar="NAME",
        help="inception, dinov2, efficientnet-lite0 or pixels; auto: pixels for tiny images, else inception",
    )  # fmt: skip
    add("--weights", type=Path, metavar="PATH", help="weights of the features: file or directory")
    add(
        "--metrics", default="frechet,kernel,neighbours,score", metavar="LIST",  # words: ok
        help="metrics to compute; neighbors: precision, recall, density, coverage",
    )  # fmt: skip
    add("--count", type=int, default=50_000, metavar="N", help="images to generate for each seed")
    add("--seeds", default="0,1,2", metavar="LIST", help="seeds of the latents, separated by commas")
    add(
        "--labels", default="proportional", choices=("proportional", "uniform", "ignore"),
        help="classes to generate: with the frequencies of the reference, or uniform; ignore: ignore labels",
    )  # fmt: skip
    add(
        "--classifier", metavar="NAME",
        help="svm (fitted on the reference), or a file of torch.export.save, which is a program and is run: "
        "it needs --trust-classifier",
    )  # fmt: skip
    add(
        "--trust-classifier", action="store_true",
        help="run the program in the file of --classifier, with all your rights",
    )  # fmt: skip
    add(
        "--max-bytes", type=int, default=UNPACKED_LIMIT, metavar="N",
        help="memory that the arrays of an .npz may take together, at most",
    )  # fmt: skip
    add("--vae", type=Path, metavar="DIR", help="AutoencoderKL that decodes latents")
    add(
        "--calibration", action="store_true",
        help="instead: measure the calibration of a run's ratio networks (docs/verifier.md)",
    )  # fmt: skip
    add(
        "--save-reference",
        type=Path,
        metavar="FILE",
        help="also write the statistics of the reference (.npz)",
    )
    add("--device", default="auto", metavar="TEXT", help="auto, cpu, cuda or cuda:N")
    add("--json", action="store_true", help="print the complete result as JSON")
    return result


def parse_seeds(text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) < 2**63 for word in words) or len(set(words)) < len(words):
        raise UserError(
            f"--seeds {text}: not a list of seeds; expected different integers from 0, separated by commas"
        )
    return tuple(map(int, words))


def options_of(arguments: argparse.Namespace) -> Options:
    """Convert and check the options."""
    from diffratio_fast.metrics.protocol import Options
    from diffratio_fast.metrics.results import METRICS

    metrics = tuple(word.strip() for word in arguments.metrics.split(","))
    if unknown := [word for word in metrics if word not in METRICS]:
        raise UserError(f"--metrics {unknown[0]}: unknown; expected a list of {', '.join(METRICS)}")
    if arguments.count < 2:
        raise UserError(f"--count {arguments.count}: out of range; expected at least 2")
    if arguments.max_bytes < 1:
        raise UserError(f"--max-bytes must be at least 1, not {arguments.max_bytes}")
    if arguments.save_reference is not None and arguments.save_reference.suffix != ".npz":
        raise UserError(f"--save-reference {arguments.save_reference}: expected an .npz file")
    elsewhere = ("json", "metrics", "seeds", "calibration")
    given = {name: value for name, value in vars(arguments).items() if name not in elsewhere}
    return Options(**given, metrics=metrics, seeds=parse_seeds(arguments.seeds))


def main(argv: list[str]) -> int:
    arguments = parser().parse_args(argv)
    if arguments.calibration:
        return calibrate(arguments.subject, arguments.device, as_json=arguments.json)
    options = options_of(arguments)
    from diffratio_fast.metrics.protocol import evaluate

    result = evaluate(options)
    print(json.dumps(result, indent=1, allow_nan=False) if arguments.json else table(result))
    run: Path = arguments.subject
    if RunPaths(run).config.exists() and os.access(run, os.W_OK):
        keep_evaluation(run, result)
        report.write(run)
        if not arguments.json:
            print(f"{RunPaths(run).report}: report with these metrics")
    return 0


def calibrate(run: Path, device: str, *, as_json: bool) -> int:
    """Print the calibration of a run's ratio networks, and write it to the report of the run."""
    from diffratio_fast.devices import choose_device
    from diffratio_fast.verifier import tables

    found = tables.calibrate_run(run, choose_device(device))
    as_data = tables.plain(found)
    print(json.dumps(as_data, indent=1, allow_nan=False) if as_json else tables.text(found))
    return 0


def table(result: dict[str, Any]) -> str:
    """Format the result as text: the inputs, then one line per metric."""
    subject, reference, extractor = (result[name] for name in ("subject", "reference", "extractor"))
    weights = extractor["weights_sha256"]
    seeds = "" if result["seeds"] is None else f", seeds {', '.join(map(str, result['seeds']))}"
    count = reference.get("count")
    lines = [
        f"{subject['path']}: {result['count']:,} images{seeds}; labels: {result['labels']}",
        f"against {reference.get('name') or reference.get('path')} {reference.get('split', '')}"
        + (f", {count:,} images" if count else ""),
        f"features: {extractor['name']}" + (f", weights {weights[:12]}" if weights else ""),
    ]
    several = len(result["results"]) > 1
    floors = result["floors"]
    header = ["", "mean", "best"] if several else ["", "value"]
    for name, floor in floors.items():
        header += [f"n={floor['count']:,}", f"real ({name})"]
    rows = [header]
    for name, metric in result["summary"].items():
        row = [name, _number(metric["mean"])]
        row += [_number(metric.get("best"))] if several else []
        for floor in floors.values():
            row += [_number(floor[which].get(name)) for which in ("generated", "real")]
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines += [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


if __name__ == "__main__":
    command.run(main)
