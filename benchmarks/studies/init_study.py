"""From scratch or from a pre-trained denoiser: (generator, ratio network) x (random, pre-trained).

    python -m benchmarks.studies.init_study DATA [--json FILE] [--images DIRECTORY] [--seeds N]

DATA is a directory of prepared Fashion-MNIST, of which 10,000 images are averaged to 14 x 14. A small U-Net
is pre-trained on them as a denoiser; then the four combinations of initial weights are trained with the same
options (the ratio network is the U-Net's encoder and has a warm-up alone). The metric is the Fréchet distance
on pixels of the averaged generator to validation images. A seed takes a few minutes on one core.
"""

from __future__ import annotations

import json
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.figures import Figures
from diffratio_fast import command, networks
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import DataSet, InMemoryDataSet
from diffratio_fast.data.scaling import Scaling
from diffratio_fast.errors import UserError
from diffratio_fast.metrics.quality import Quality
from diffratio_fast.metrics.spaces import PixelSpace
from diffratio_fast.networks.published import save_published
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer

CPU = torch.device("cpu")
RECORDS = {"train": 10_000, "validation": 2000, "test": 2000}
SAMPLES = 1000
BACKBONE: dict[str, Any] = {
    "backbone": "edm:ddpmpp",
    "backbone_options": json.dumps(
        {"model_channels": 12, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [7]}
    ),
}
PRETRAINING: dict[str, Any] = {
    "steps": 300, "batch_size": 32, "lr": 2e-3, "beta1": 0.9, "lr_warmup_steps": 50,
    "lr_schedule": "cosine", "ema_half_life_images": 3000.0,
}  # fmt: skip
TRAINING: dict[str, Any] = {
    "steps": 240, "batch_size": 32, "generator": "backbone", "ratio_network": "encoder",
    "generator_lr": 5e-4, "ratio_lr": 1e-3, "divergence": "jensen_shannon",
    "ratio_noise": "loguniform(0.05, 5)", "weight": "bounded", "ratio_warmup_steps": 50,
    "generator_ramp_steps": 50, "ema_half_life_images": 1500.0,
}  # fmt: skip
STARTS = {
    "both random": None,
    "generator pre-trained": "generator",
    "ratio network pre-trained": "ratio",
    "both pre-trained": "both",
}
EVERY = 60


def reduced(dataset: DataSet, share: float = 1.0) -> InMemoryDataSet:
    """The first records of each split, averaged over 2 x 2 pixels."""
    splits = {}
    for split, count in RECORDS.items():
        records, labels = dataset.first(split, max(64, round(count * share)))
        small = torch.nn.functional.avg_pool2d(records.float(), 2).round().to(torch.uint8)
        splits[split] = small, labels
    values = splits["train"][0].double()
    scaling = Scaling(
        (float(values.mean()),), (float(values.std(correction=0)),), dataset.scaling.low,
        dataset.scaling.high,
    )  # fmt: skip
    return InMemoryDataSet(f"{dataset.name}, 14 x 14", dataset.class_names, scaling, splits)


def pretrained(dataset: InMemoryDataSet, seed: int, steps: int, path: Path) -> float:
    """Write the averaged denoiser to ``path``; return its weighted error on validation images."""
    config = PretrainConfig(**BACKBONE, **(PRETRAINING | {"steps": steps, "seed": seed}))
    iteration = Pretrainer.new_iteration(config, dataset, CPU)
    average = iteration.state.average
    batches = dataset.batches("train", config.batch_size, seed=seed)
    for _ in range(steps):
        iteration.run([next(batches)])
    assert isinstance(average, Denoiser)
    save_published(path, average, {"scaling": json.dumps(vars(dataset.scaling))})
    return iteration.validation_error(iteration.to_device(dataset.first("validation", 512)))


def train(dataset: InMemoryDataSet, start: str, denoiser: Path, seed: int, steps: int) -> dict[str, Any]:
    """Train one combination; return distances to validation images against steps."""
    chosen = STARTS[start]
    given = {} if chosen is None else {"init": str(denoiser), "init_networks": chosen}
    share = steps / TRAINING["steps"]
    short = {name: round(share * TRAINING[name]) for name in ("ratio_warmup_steps", "generator_ramp_steps")}
    config = TrainConfig(**BACKBONE, **(TRAINING | short | given | {"steps": steps, "seed": seed}))
    iteration = Trainer.new_iteration(config, dataset, CPU)
    metrics = Quality(dataset, PixelSpace(dataset))
    labels = metrics.labels("validation", SAMPLES)
    batches = dataset.batches("train", config.batch_size, seed=seed)
    curve = []
    for step in range(steps + 1):
        if step == steps or step % max(1, round(EVERY * share)) == 0:
            images = networks.generate(iteration.state.average, labels, seed=7)
            curve.append((step, metrics.distance(images, "validation")))
        if step < steps:
            iteration.run([next(batches)])
    return {"start": start, "seed": seed, "steps": [s for s, _ in curve], "distance": [d for _, d in curve]}


def study(dataset: InMemoryDataSet, seeds: int, share: float) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(seeds):
            path = Path(folder) / f"denoiser-{seed}.safetensors"
            steps = max(2, round(PRETRAINING["steps"] * share))
            error = pretrained(dataset, seed, steps, path)
            print(f"seed {seed}: denoiser with a weighted error of {error:.3f}", flush=True)
            for start in STARTS:
                began = time.process_time()
                row = train(dataset, start, path, seed, max(4, round(TRAINING["steps"] * share)))
                row |= {"denoiser_error": error, "seconds": round(time.process_time() - began, 1)}
                print(f"seed {seed}, {start}: {row['distance'][-1]:.2f} ({row['seconds']:.0f} s)", flush=True)
                yield row


def _spread(values: list[float]) -> tuple[float, float]:
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values)) if len(
        values
    ) > 1 else 0.0


def table(rows: list[dict[str, Any]]) -> str:
    """Format as Markdown: distances at quarters of the training, with standard errors over seeds."""
    steps = rows[0]["steps"]
    places = [round(quarter * (len(steps) - 1) / 4) for quarter in range(1, 5)]
    head = " | ".join(f"step {steps[place]}" for place in places)
    lines = [f"| start | {head} |", "|---" * (1 + len(places)) + "|"]
    for start in STARTS:
        group = [row["distance"] for row in rows if row["start"] == start]
        cells = ("{:.1f} ± {:.1f}".format(*_spread([curve[p] for curve in group])) for p in places)
        lines.append(f"| {start} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], figures: Figures) -> None:
    figure, axis = figures.pyplot.subplots(figsize=(5.5, 3.5))
    for start in STARTS:
        curves = [row["distance"] for row in rows if row["start"] == start]
        means, bars = zip(*(_spread(list(values)) for values in zip(*curves, strict=True)), strict=True)
        axis.errorbar(rows[0]["steps"], means, bars, label=start, marker=".", capsize=2)
    axis.set(yscale="log", xlabel="steps", ylabel="Fréchet distance to validation images")
    axis.legend(frameon=False)
    figure.tight_layout()
    figures.save(figure, "init_study")


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.studies.init_study", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="directory of a prepared data set of 28 x 28 images")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--images", type=Path, metavar="DIRECTORY", help="write the figure to this directory")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repetitions [1]")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="fraction of steps and images")
    options = parser.parse_args(argv)
    if not 0 < options.scale <= 1 or options.seeds < 1:
        raise UserError(
            "--scale or --seeds: out of range; expected --scale above 0 and at most 1, --seeds at least 1"
        )
    figures = None if options.images is None else Figures(options.images)
    torch.set_num_threads(1)
    dataset = reduced(open_dataset(options.data), options.scale)
    rows = list(study(dataset, options.seeds, options.scale))
    if options.json is not None:
        content = {"torch": torch.__version__, "data": dataset.name, "rows": rows}
        replace_file(options.json, json.dumps(content, indent=1) + "\n")
    print(table(rows))
    if figures is not None:
        draw(rows, figures)
    return 0


if __name__ == "__main__":
    command.run(main)
