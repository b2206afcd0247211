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

PROTOCOLS = ("fid", "fdd", "edm")
DEFAULTS: dict[str, Any] = {
    "features": "auto", "split": "train", "count": 50_000, "seeds": (0, 1, 2), "labels": "proportional"
}  # fmt: skip
"""What --protocol may fix; the parser's own defaults are None, so that what was given is known."""
EPILOG = """The protocol of published figures is the default: 50,000 images of each of three seeds, as uint8,
against the training split; the mean of the seeds stands beside the best. See docs/evaluation.md."""


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
    add(
        "--protocol", choices=PROTOCOLS,
        help="a published protocol: fixes --features, --split, --count, --seeds and --labels, and refuses "
        "what does not fit (docs/evaluation.md)",
    )  # fmt: skip
    add(
        "--split", choices=("train", "validation", "test"),
        help=f"of the reference data set [{DEFAULTS['split']}]",
    )  # fmt: skip
    add(
        "--features", metavar="NAME",
        help="inception, dinov2, efficientnet-lite0 or pixels; auto: pixels for tiny images, else inception "
        f"[{DEFAULTS['features']}]",
    )  # fmt: skip
    add("--weights", type=Path, metavar="PATH", help="weights of the features: file or directory")
    add(
        "--metrics", default="frechet,kernel,neighbours,score", metavar="LIST",
        help="which metrics; neighbors are precision, recall, density, coverage; fid, kid, is and fdd also "
        "choose the features",
    )  # fmt: skip
    add("--count", type=int, metavar="N", help=f"images to generate for each seed [{DEFAULTS['count']:,}]")
    add("--seeds", type=parse_seeds, metavar="LIST", help="seeds of the latents, with commas between [0,1,2]")
    add(
        "--labels", choices=("proportional", "uniform", "ignore"),
        help="classes to generate: as frequent as in the reference or equally; ignore: do not look at labels "
        f"[{DEFAULTS['labels']}]",
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


def parse_metrics(text: str) -> tuple[tuple[str, ...], str | None]:
    """The metrics of a list, and the features that published names among them need (None: any)."""
    from diffratio_fast.metrics.results import METRICS, PUBLISHED_NAMES

    words = [word.strip() for word in text.split(",")]
    if unknown := [word for word in words if word not in (*METRICS, *PUBLISHED_NAMES)]:
        known = ", ".join((*METRICS, *PUBLISHED_NAMES))
        raise UserError(f"--metrics: no such metric: {unknown[0]!r}; known: {known}")
    needed = {PUBLISHED_NAMES[word][1] for word in words if word in PUBLISHED_NAMES}
    if len(needed) > 1:
        raise UserError(f"--metrics {text}: these are of different features; evaluate once for each")
    metrics = [PUBLISHED_NAMES[word][0] if word in PUBLISHED_NAMES else word for word in words]
    return tuple(dict.fromkeys(metrics)), next(iter(needed), None)


def options_of(arguments: argparse.Namespace) -> Options:
    """The options, checked as far as they can be on their own."""
    from diffratio_fast.metrics import published
    from diffratio_fast.metrics.protocol import Options

    metrics, features = parse_metrics(arguments.metrics)
    given = vars(arguments)
    if features is not None and arguments.features not in (None, features):
        raise UserError(
            f"--metrics {arguments.metrics}: needs --features {features}, not {arguments.features}"
        )
    chosen = published.resolve(
        arguments.protocol, given | {"features": arguments.features or features}, DEFAULTS
    )
    if chosen["count"] < 2:
        raise UserError(f"--count must be at least 2, not {chosen['count']}")
    if arguments.max_bytes < 1:
        raise UserError(f"--max-bytes must be at least 1, not {arguments.max_bytes}")
    if arguments.save_reference is not None and arguments.save_reference.suffix != ".npz":
        raise UserError(f"--save-reference {arguments.save_reference}: name an .npz")
    elsewhere = ("json", "metrics", "calibration", *DEFAULTS)
    plain = {name: value for name, value in given.items() if name not in elsewhere}
    if arguments.protocol is not None and "frechet" not in metrics:
        metrics = ("frechet", *metrics)
    return Options(**plain, **chosen, metrics=metrics)


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
    if (protocol := result.get("protocol")) is not None:
        value = result["summary"][protocol["metric"]][protocol["quoted"]]
        lines.append(
            f"protocol {protocol['name']} ({protocol['source']}): {protocol['metric'].upper()} "
            f"{value:.4g}, the "
            f"{'lowest' if protocol['quoted'] == 'best' else 'mean'} of {len(result['results'])}"
        )
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
