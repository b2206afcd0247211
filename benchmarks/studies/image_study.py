"""Ratio, denoisers or GAN on images: equal CPU time from one pre-trained denoiser.

    python -m benchmarks.studies.image_study DATA [--json FILE] [--images DIRECTORY] [--seeds N]
        [--methods NAME,...] [--teacher strong|weak|few] [--seconds S] [--factor F]

DATA is a directory of prepared images, averaged over F x F pixels. A small U-Net is pre-trained on them as a
denoiser. Then every method trains the generator that starts from it, for as many steps as cost S seconds of
CPU time: the cost of a step is measured beforehand, all methods in turn, so that other work on the machine
does not decide. Metrics are against the test split; "teacher" names how well the denoiser was trained.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.studies.figures import Figures
from benchmarks.studies.small_images import Judge, averaged, fitted_classifier, spread
from diffratio_fast import command, networks
from diffratio_fast.config.pretrain import PretrainConfig
from diffratio_fast.config.train import TrainConfig
from diffratio_fast.data import open_dataset
from diffratio_fast.data.dataset import InMemoryDataSet
from diffratio_fast.data.pictures import grid, png
from diffratio_fast.errors import UserError
from diffratio_fast.networks.published import save_published
from diffratio_fast.networks.unet import Denoiser
from diffratio_fast.storage.writing import replace_file
from diffratio_fast.training.denoiser_run import Pretrainer
from diffratio_fast.training.generator_run import Trainer
from diffratio_fast.training.step.generator import Iteration

CPU = torch.device("cpu")
RECORDS = {"train": 54_000, "validation": 2000, "test": 10_000}
SAMPLES = 3000
GRID = 100
EPOCHS = 3
BACKBONE: dict[str, Any] = {
    "backbone": "edm:ddpmpp",
    "backbone_options": json.dumps(
        {"model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [7]}
    ),
}
PRETRAINING: dict[str, Any] = {
    "batch_size": 64, "lr": 2e-3, "beta1": 0.9, "lr_schedule": "cosine", "ema_half_life_images": 8000.0,
    "channels_last": True,
}  # fmt: skip
TEACHERS: dict[str, tuple[int, int]] = {"strong": (700, 54_000), "weak": (150, 54_000), "few": (350, 1000)}
"""Steps of pre-training, and training images that it sees."""
TRAINING: dict[str, Any] = {
    "batch_size": 32, "generator": "backbone", "ratio_network": "encoder", "generator_lr": 2e-4,
    "ratio_lr": 1e-3, "beta1": 0.0, "beta2": 0.99, "divergence": "reverse_kl", "weight": "bounded",
    "ratio_noise": "loguniform(0.05, 5)", "lr_schedule": "cosine", "lr_final": 0.1,
    "ratio_warmup_steps": 60, "generator_ramp_steps": 60, "ema_half_life_images": 2000.0,
    "channels_last": True,
}  # fmt: skip
_MLP: dict[str, Any] = {
    "ratio_network": "mlp", "ratio_head": "energy", "ratio_width": 256, "ratio_depth": 4,
}  # fmt: skip
_VSD: dict[str, Any] = {
    "objective": "vsd", "weight": "sigma2", "vsd_normalize": True, "ratio_lr": 4e-4,
    "ratio_noise": "lognormal(-0.5, 1.2)", "ratio_warmup_steps": 0, "generator_lr": 4e-4,
}  # fmt: skip
METHODS: dict[str, dict[str, Any]] = {
    "score distillation": _VSD,
    "encoder + separate noise": {"ratio_shared_noise": False},
    "encoder": {},
    "encoder + energy": {"ratio_head": "energy"},
    "MLP": _MLP | {"ratio_head": "scalar"},
    "MLP + energy": _MLP,
    "MLP + energy + 4 draws": _MLP | {"noise_draws": 4},
    "MLP + energy + 8 draws": _MLP | {"noise_draws": 8},
    "MLP + energy + 2 ratio steps": _MLP | {"ratio_steps": 2},
    "MLP + energy + weight dmd": _MLP | {"weight": "dmd"},
    "mixer + energy + 4 draws": {
        "ratio_network": "mixer",
        "ratio_head": "energy",
        "ratio_width": 64,
        "ratio_depth": 4,
        "ratio_patch": 2,
        "noise_draws": 4,
    },
    "conditional denoiser": {
        "objective": "conditional",
        "weight": "sigma2",
        "ratio_lr": 4e-4,
        "ratio_noise": "lognormal(-0.5, 1.2)",
    },
    "GAN": {
        "objective": "gan",
        "divergence": "softened_reverse_kl",
        "weight": "uniform",
        "ratio_noise": "fixed(0.05)",
    },
}
"""Options that differ from ``TRAINING``."""
CURVE = 3
"""Evaluations of a training, evenly spread; the last is at its end."""
COST_ROUNDS = 8


def pretrained(dataset: InMemoryDataSet, teacher: str, seed: int, share: float, path: Path) -> dict[str, Any]:
    """Write the average of a denoiser to ``path``; its weighted validation error, and seconds of CPU time."""
    steps, images = TEACHERS[teacher]
    steps = max(2, round(share * steps))
    seen = InMemoryDataSet(
        dataset.name, dataset.class_names, dataset.scaling,
        dataset.splits | {"train": dataset.first("train", images)},
    )  # fmt: skip
    config = PretrainConfig(
        **BACKBONE, **PRETRAINING, steps=steps, seed=seed, lr_warmup_steps=min(50, steps // 4)
    )
    iteration = Pretrainer.new_iteration(config, seen, CPU)
    average = iteration.state.average
    batches = seen.batches("train", config.batch_size, seed=seed)
    began = time.process_time()
    for _ in range(steps):
        iteration.run([next(batches)])
    seconds = time.process_time() - began
    assert isinstance(average, Denoiser)
    save_published(path, average, {"scaling": json.dumps(vars(dataset.scaling))})
    error = iteration.validation_error(iteration.to_device(dataset.first("validation", 512)))
    return {"teacher_error": error, "teacher_seconds": round(seconds, 1)}


def iteration_of(
    dataset: InMemoryDataSet, method: str, denoiser: Path, steps: int, seed: int, share: float
) -> Iteration:
    """The first state of a training by ``method``, and its steps."""
    options = TRAINING | METHODS[method]
    for name in ("ratio_warmup_steps", "generator_ramp_steps"):
        options[name] = round(share * options[name])
    fits = "objective" in options or options["ratio_network"] == "encoder"
    config = TrainConfig(
        **BACKBONE, **options, steps=steps, seed=seed, init=str(denoiser),
        init_networks="both" if fits else "generator",
    )  # fmt: skip
    return Trainer.new_iteration(config, dataset, CPU)


def step_costs(
    dataset: InMemoryDataSet, methods: Sequence[str], denoiser: Path
) -> dict[str, tuple[float, float]]:
    """Least CPU seconds of a step of each method, (in the warm-up, after it), measured in turn."""
    made = {method: iteration_of(dataset, method, denoiser, 10_000, 0, 1.0) for method in methods}
    found: dict[str, tuple[list[float], list[float]]] = {method: ([], []) for method in methods}
    for _ in range(COST_ROUNDS):
        for method, iteration in made.items():
            config = iteration.config
            batches = dataset.batches("train", config.batch_size, seed=0)
            for at, times in zip((0, sum(config.warmup_and_ramp())), found[method], strict=True):
                iteration.state.step = at
                given = [next(batches) for _ in range(config.ratio_steps)]
                began = time.process_time()
                iteration.run(given)
                times.append(time.process_time() - began)
    return {method: (min(warm), min(full)) for method, (warm, full) in found.items()}


def steps_for(seconds: float, cost: tuple[float, float], warmup: int) -> int:
    """Steps that cost ``seconds``, of which ``warmup`` do not train the generator."""
    return warmup + max(1, round((seconds - warmup * cost[0]) / cost[1]))


def train(
    dataset: InMemoryDataSet, judge: Judge, method: str, denoiser: Path, steps: int, seed: int, share: float
) -> tuple[dict[str, Any], torch.Tensor]:
    """Metrics of one training at ``CURVE`` times, and its last images."""
    iteration = iteration_of(dataset, method, denoiser, steps, seed, share)
    config, state = iteration.config, iteration.state
    batches = dataset.batches("train", config.batch_size, seed=seed)
    places = [round(steps * part / CURVE) for part in range(1, CURVE + 1)]
    curve: list[dict[str, float]] = []
    seconds = 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        iteration.run([next(batches) for _ in range(config.ratio_steps)])
        seconds += time.process_time() - began
        if step in places:
            images = networks.generate(state.average, judge.labels, seed=7)
            curve.append({"step": step} | judge(images))
    row = {
        "method": method, "seed": seed, "steps": steps, "images": steps * config.batch_size,
        "seconds": round(seconds, 1), "options": METHODS[method], "curve": curve,
    }  # fmt: skip
    return row | {name: value for name, value in curve[-1].items() if name != "step"}, images


def study(
    dataset: InMemoryDataSet, methods: Sequence[str], teacher: str, seeds: int, seconds: float,
    *, share: float = 1.0, pictures: Path | None = None,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """Rows of the study: real images, the start, then every method with every seed."""
    samples = max(40, round(share * SAMPLES))
    judge = Judge(dataset, fitted_classifier(dataset, EPOCHS), samples)
    yield {"method": "real images", "seed": 0} | judge.real()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "denoiser.safetensors"
        about = pretrained(dataset, teacher, 0, share, path)
        print(f"denoiser with a weighted error of {about['teacher_error']:.3f}", flush=True)
        begun = iteration_of(dataset, methods[0], path, 1, 0, share).state
        yield (
            {"method": "start", "seed": 0}
            | about
            | judge(networks.generate(begun.average, judge.labels, seed=7))
        )
        costs = step_costs(dataset, methods, path)
        for seed in range(seeds):
            for method in methods:
                warmup = round(share * (TRAINING | METHODS[method])["ratio_warmup_steps"])
                steps = steps_for(seconds, costs[method], warmup)
                row, images = train(dataset, judge, method, path, steps, seed, share)
                row |= {"teacher": teacher, "budget": seconds, "cost": costs[method]}
                if pictures is not None and seed == 0:
                    shown = dataset.scaling.to_records(images[:GRID]).clamp(0, 255).round().to(torch.uint8)
                    replace_file(pictures / f"{method.replace(' ', '_')}.png", png(grid(shown, 10)))
                print(f"seed {seed}, {method}: {_cells(row)} ({row['seconds']:.0f} s)", flush=True)
                yield row


COLUMNS = ("pixels", "features", "accuracy", "precision", "recall", "coverage")


def _cells(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {row[name]:.3g}" for name in COLUMNS)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: mean and standard error over seeds."""
    lines = [f"| method | steps | {' | '.join(COLUMNS)} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for method in dict.fromkeys(row["method"] for row in rows):
        group = [row for row in rows if row["method"] == method]
        cells = []
        for name in COLUMNS:
            mean, error = spread([row[name] for row in group])
            digits = 2 if mean < 10 else 1
            cells.append(f"{mean:.{digits}f}" + (f" ± {error:.{digits}f}" if len(group) > 1 else ""))
        steps = f"{statistics.mean(row['steps'] for row in group):.0f}" if "steps" in group[0] else ""
        lines.append(f"| {method} | {steps} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], figures: Figures) -> None:
    """Distances on features against steps, in shares of the budget."""
    figure, axis = figures.pyplot.subplots(figsize=(6, 4))
    for method in dict.fromkeys(row["method"] for row in rows if "curve" in row):
        curves = [[point["features"] for point in row["curve"]] for row in rows if row["method"] == method]
        means, bars = zip(*(spread(list(values)) for values in zip(*curves, strict=True)), strict=True)
        budget = next(row["budget"] for row in rows if row["method"] == method)
        seconds = [budget * (part + 1) / len(means) for part in range(len(means))]
        axis.errorbar(seconds, means, bars, label=method, marker=".", capsize=2)
    axis.set(yscale="log", xlabel="seconds of CPU time", ylabel="Fréchet distance on features")
    axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figures.save(figure, "image_study")


def main(argv: list[str]) -> int:
    parser = command.Parser(prog="python -m benchmarks.studies.image_study", description=__doc__)
    parser.add_argument("data", metavar="DATA", help="directory of a prepared data set")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument("--images", type=Path, metavar="DIRECTORY", help="write figure and grids there")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="repetitions [1]")
    parser.add_argument(
        "--seconds", type=float, default=60.0, metavar="S", help="CPU time of a training [60]"
    )
    parser.add_argument("--factor", type=int, default=2, metavar="F", help="average F x F pixels [2]")
    parser.add_argument("--teacher", default="strong", choices=list(TEACHERS), help="pre-training [strong]")
    parser.add_argument("--methods", metavar="NAME,...", help=f"of: {', '.join(METHODS)} [all]")
    options = parser.parse_args(argv)
    methods = list(METHODS) if options.methods is None else options.methods.split(",")
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"--methods {unknown[0]}: the methods are {', '.join(METHODS)}")
    if options.seeds < 1 or options.seconds <= 0 or options.factor < 1:
        raise UserError("--seeds and --factor must be at least 1, --seconds above 0")
    figures = None if options.images is None else Figures(options.images)
    torch.set_num_threads(1)
    dataset = averaged(open_dataset(options.data), RECORDS, options.factor)
    rows = []
    for row in study(
        dataset, methods, options.teacher, options.seeds, options.seconds, pictures=options.images
    ):
        rows.append(row)
        if options.json is not None:
            content = {"torch": torch.__version__, "data": dataset.name, "rows": rows}
            replace_file(options.json, json.dumps(content, indent=1) + "\n")
    print(table(rows))
    if figures is not None:
        draw(rows, figures)
    return 0


if __name__ == "__main__":
    command.run(main)
