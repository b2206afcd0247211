"""Training on a GPU, in numbers: images per second and memory of presets, eager, captured and compiled.

    python -m benchmarks.gpu.training --out DIR [--time-limit SECONDS] [--preset NAME ...] [--mode NAME ...]

Runs ``python -m diffratio_fast.train`` on random records of each preset's shape until it has logged enough,
then ends it by SIGTERM, as a batch system would. Needs the package's own dependencies; ``--wheels DIR``
installs missing ones from files, without a network. ``--device cpu --tiny`` tries the command without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu.jobs import Job, Jobs
from diffratio_fast import command
from diffratio_fast.config.presets import DATA_SHAPES
from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import replace_file

MODES: dict[str, list[str]] = {
    "eager": [],
    "capture": ["--capture"],
    "compile": ["--compile"],
    "compile, capture": ["--compile", "--capture"],
}
PRESETS = ("cifar10", "imagenet512-xs")
PACKAGES = {
    "numpy": "numpy",
    "yaml": "PyYAML",
    "safetensors": "safetensors",
    "xxhash": "xxhash",
    "tqdm": "tqdm",
}
"""What a training imports, by module."""
RECORDS = 2048
LINES = 12
"""Log lines after which a run has been measured; the first third is warm-up."""
TINY = '{"model_channels": 8, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8]}'


def install_missing(wheels: Path | None, jobs: Jobs) -> None:
    """Install packages that are missing from wheel files; a ``UserError`` names those that still are."""
    missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing and wheels is not None:
        pip: list[str | Path] = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--no-index",
            "--find-links",
            wheels,
            *missing,
        ]
        jobs.run(Job("install", pip, 120))
        importlib.invalidate_caches()
        missing = [name for module, name in PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"training needs {', '.join(missing)}, not installed here; bring their wheels (pip download) "
            "and give --wheels DIR"
        )


def numbers(metrics: Path) -> dict[str, Any]:
    """Images per second (median after the warm-up), peak memory and share of waiting of a run's log."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
    lines = [line for line in lines if "images_per_second" in line]
    settled = lines[len(lines) // 3 :]
    if not settled:
        return {"lines": 0}
    return {
        "lines": len(lines),
        "step": settled[-1]["step"],
        "images_per_second": statistics.median(line["images_per_second"] for line in settled),
        "peak_memory_bytes": max(line["memory_bytes"] for line in settled),
        "loader_share": statistics.median(line["loader_share"] for line in settled),
        "ratio_loss": settled[-1].get("ratio_loss"),
    }


def train_command(
    preset: str, mode: str, data: Path, run: Path, options: argparse.Namespace
) -> list[str | Path]:
    line: list[str | Path] = [
        sys.executable, "-m", "diffratio_fast.train", preset, "--data", data, "--run-dir", run,
        "--device", options.device, "--log-every", "2" if options.tiny else "5", *MODES[mode],
    ]  # fmt: skip
    if options.tiny:
        line += ["--backbone-options", TINY, "--batch-size", "4", "--precision", "float32"]
        if "imagenet512" in preset:
            line += ["--micro-batch", "2"]
    return line


def measure(
    preset: str, mode: str, data: Path, jobs: Jobs, options: argparse.Namespace, limit: float
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as place:
        run = Path(place) / "run"
        metrics = run / "metrics.jsonl"
        name = f"{preset}-{mode.replace(', ', '-')}"
        job = Job(name, train_command(preset, mode, data, run, options), limit)
        outcome = jobs.run(job, until=lambda: numbers(metrics)["lines"] >= options.lines)
        found = numbers(metrics)
        if metrics.exists():
            shutil.copy2(metrics, jobs.out / f"{name}.jsonl")
    return {"preset": preset, "mode": mode, "outcome": outcome, **found}


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| preset | mode | images/s | peak memory, GiB | waiting for data |", "|---|---|---|---|---|"]
    for row in rows:
        if "images_per_second" not in row:
            lines.append(f"| `{row['preset']}` | {row['mode']} | {row['outcome']} | - | - |")
            continue
        memory = row["peak_memory_bytes"] / 2**30
        rate, share = f"{row['images_per_second']:,.1f}", f"{row['loader_share']:.1%}"
        lines.append(f"| `{row['preset']}` | {row['mode']} | {rate} | {memory:.2f} | {share} |")
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    began = time.monotonic()
    parser = command.Parser(prog="python -m benchmarks.gpu.training", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-results/training"), metavar="DIR")
    parser.add_argument("--time-limit", type=float, default=570.0, metavar="SECONDS", help="of all runs")
    parser.add_argument(
        "--preset", nargs="+", default=list(PRESETS), choices=tuple(DATA_SHAPES), metavar="NAME"
    )
    parser.add_argument("--mode", nargs="+", default=list(MODES), choices=tuple(MODES), metavar="NAME")
    parser.add_argument("--lines", type=int, default=LINES, help="log lines after which a run is ended")
    parser.add_argument(
        "--wheels", type=Path, metavar="DIR", help="install missing packages from these files"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny networks and batches, to try the command")
    options = parser.parse_args(argv)
    jobs = Jobs(options.out.resolve(), began + options.time_limit)
    install_missing(options.wheels, jobs)
    from benchmarks.bench_data import make_shards  # imports what a training does

    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        runs = [(preset, mode) for mode in options.mode for preset in options.preset]
        for number, (preset, mode) in enumerate(runs):
            data = Path(place) / preset
            if not data.exists():
                make_shards(data, 64 if options.tiny else RECORDS, DATA_SHAPES[preset][1])
            limit = max(jobs.left(), 0.0) / (len(runs) - number)
            rows.append(measure(preset, mode, data, jobs, options, limit))
            replace_file(jobs.out / "training.json", json.dumps(rows, indent=1) + "\n")
            replace_file(jobs.out / "training.md", table(rows) + "\n")
    print(table(rows))
    return jobs.finish()


if __name__ == "__main__":
    command.run(main)
