"""Errors of score differences: the gradient of a ratio network against the difference of two denoisers.

    python -m benchmarks.studies.bias_study [--json FILE] [--images DIRECTORY] [--only PART ...] [--scale X]

Data and generators are mixtures of Gaussians in 2, 16 and 64 dimensions, so noised densities and scores are
known. All networks are residual networks with equal numbers of parameters, steps and samples; each is trained
several times with different seeds, in one batch. Parts:

- ``scores``: a frozen generator; error of the score difference at each noise level, as a cosine and a
relative
  error with its squared bias (mean over trainings) and variance;
- ``training``: generators trained to the end; their exact distance to the data against steps;
- ``knobs``: the same in 16 dimensions with one setting changed at a time;
- ``switches``: shared noise, energy head, matched pairs and ratio steps, one after another, and stable
  targets of score distillation, in 16 and 64 dimensions.

The first three parts use separate noise and scalar heads, as the package did when they were computed.

A part takes about two minutes on one core. This command writes the figures and tables of docs/bias_study.md.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.studies.batched_networks import (
    Denoisers,
    EnergyRatios,
    Ratios,
    matched_width,
    parameter_count,
)
from benchmarks.studies.bias_training import Recipe, exact_slope, train_generators
from benchmarks.studies.figures import Figures
from benchmarks.studies.mixtures import Mixture, clusters
from benchmarks.studies.score_estimators import Settings, train_denoiser, train_ratio
from diffratio_fast import command
from diffratio_fast.data.scaling import SIGMA_DATA
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.errors import UserError
from diffratio_fast.objectives.weights import WEIGHTS
from diffratio_fast.storage.writing import replace_file

Row = dict[str, Any]

DIMENSIONS = (2, 16, 64)
CLUSTERS, STD = 8, 0.2
SEEDS = 4
STEPS = 1000
WIDTH, DEPTH = 48, 3
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
POINTS = 2048
RATIO = Settings(STEPS, rate=5e-3)
DENOISER = Settings(STEPS, rate=1e-2)
"""The best of 2e-3, 5e-3 and 1e-2 for each kind, in 16 dimensions."""
FEW = 256
"""Number of data points in the case of few data."""

ONLINE_RATIO = Settings(0, rate=1e-2, beta1=0.0)
ONLINE_STUDENT = Settings(0, rate=3e-3, beta1=0.0)
DIFFRATIO = Recipe(weight="bounded", online=ONLINE_RATIO, generator_rate=3e-3)
VSD = Recipe(method="vsd", weight="sigma2", online=ONLINE_STUDENT, generator_rate=3e-3)
RECIPES: dict[str, Recipe] = {
    **{f"DiffRatio, {name}": replace(DIFFRATIO, divergence=name) for name in DIVERGENCES},
    "VSD, learned teacher": VSD,
    "VSD, exact teacher": replace(VSD, method="vsd exact teacher"),
    "exact score difference": replace(DIFFRATIO, method="exact"),
}
IN_MANY_DIMENSIONS = [name for name in RECIPES if name.split(", ")[-1] not in (
    "softened_reverse_kl", "squared_hellinger", "jeffreys"
)]  # fmt: skip

_BASE = DIFFRATIO
KNOBS: dict[str, Recipe] = {
    "base": _BASE,
    "weight uniform": replace(_BASE, weight="uniform"),
    "weight sigma2": replace(_BASE, weight="sigma2"),
    "law loguniform(0.05, 1.5)": replace(_BASE, online=replace(ONLINE_RATIO, law="loguniform(0.05, 1.5)")),
    "law karras(0.02, 80), weight sigma2": replace(
        _BASE, weight="sigma2", online=replace(ONLINE_RATIO, law="karras(0.02, 80)")
    ),
    "law karras(0.02, 80)": replace(_BASE, online=replace(ONLINE_RATIO, law="karras(0.02, 80)")),
    "3 ratio steps": replace(_BASE, online_steps=3),
    "4 noise draws": replace(_BASE, noise_draws=4),
    "gradient penalty 0.1": replace(_BASE, online=replace(ONLINE_RATIO, penalty=0.1)),
    "jeffreys, clamp 1": replace(_BASE, divergence="jeffreys", clamp=1.0),
    "jeffreys, clamp 8": replace(_BASE, divergence="jeffreys", clamp=8.0),
    "256 data points": replace(_BASE, data_points=FEW),
    "256 points, weight decay 1": replace(_BASE, data_points=FEW, online=replace(ONLINE_RATIO, decay=1.0)),
    "256 points, gradient penalty 0.1": replace(
        _BASE, data_points=FEW, online=replace(ONLINE_RATIO, penalty=0.1)
    ),
}

SWITCH_DIMENSIONS = (16, 64)
_OLD = replace(DIFFRATIO, generator_rate=2e-3)
_SHARED = replace(_OLD, online=replace(ONLINE_RATIO, shared=True))
_ENERGY = replace(_SHARED, energy=True)
_MATCHED = replace(_ENERGY, online=replace(_ENERGY.online, matched=True))
SWITCHES: dict[str, Recipe] = {
    "DiffRatio, separate noise": _OLD,
    "+ shared noise": _SHARED,
    "+ energy head": _ENERGY,
    "+ matched pairs": _MATCHED,
    "+ 2 ratio steps": replace(_MATCHED, online_steps=2),
    "VSD, learned teacher": replace(VSD, generator_rate=2e-3),
    "VSD, stable targets": replace(VSD, generator_rate=2e-3, online=replace(ONLINE_STUDENT, stable=True)),
}
"""One switch after another, all with one generator rate; the teacher has stable targets with the student."""


def single(mixture: Mixture) -> Mixture:
    return Mixture(mixture.weights.float(), mixture.means.float(), mixture.stds.float())


def near(data: Mixture, generator: torch.Generator) -> Mixture:
    """Overlaps the data: centers moved by 0.3, a fifth wider, unequal weights."""
    shift = torch.randn(data.means.shape, generator=generator, dtype=torch.float64)
    shift = 0.3 * shift / shift.norm(dim=1, keepdim=True)
    weights = torch.rand(len(data.weights), generator=generator, dtype=torch.float64) + 0.5
    return Mixture(weights / weights.sum(), data.means + shift, 1.2 * data.stds)


def disjoint(data: Mixture, generator: torch.Generator) -> Mixture:
    """Almost no overlap with the data: centers scaled by 0.4, half as wide."""
    return Mixture(data.weights, 0.4 * data.means, 0.5 * data.stds)


PAIRS: dict[str, Callable[[Mixture, torch.Generator], Mixture]] = {"near": near, "disjoint": disjoint}


def decompose(estimates: Tensor, exact: Tensor) -> Row:
    """Errors of estimates [S, ...] of ``exact`` [...], over S independent trainings.

    ``error2`` = ``bias2`` + ``variance`` is the mean squared error over the exact's mean square; ``bias2`` is
    corrected for the number of trainings, so it can be slightly negative. ``*_se`` are jackknife standard
    errors over the trainings.
    """
    scale = float(exact.square().sum())
    flat, target = estimates.flatten(1), exact.flatten()

    def figures(part: Tensor) -> tuple[float, float, float, float]:
        count = len(part)
        mean = part.mean(0)
        variance = float((part - mean).square().sum()) / (count - 1) / scale
        bias2 = float((mean - target).square().sum()) / scale - variance / count
        cosine = torch.nn.functional.cosine_similarity(part, target[None], dim=1).mean()
        return float(cosine), bias2 + variance, bias2, variance

    names = ("cosine", "error2", "bias2", "variance")
    row: Row = dict(zip(names, figures(flat), strict=True))
    left_out = [figures(torch.cat((flat[:s], flat[s + 1 :]))) for s in range(len(flat))]
    for name, values in zip(names, zip(*left_out, strict=True), strict=True):
        count = len(values)
        row[f"{name}_se"] = ((count - 1) / count * count * statistics.pvariance(values)) ** 0.5
    return row


@dataclass
class Study:
    """Sizes of the study; ``scale`` below 1 reduces it, for tests."""

    scale: float = 1.0
    seeds: int = SEEDS

    def steps(self, count: int) -> int:
        return max(2, round(count * self.scale))

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, steps=self.steps(settings.steps))

    def networks(
        self, dimensions: int, generator: torch.Generator, *, energy: bool = False
    ) -> tuple[Ratios, Denoisers]:
        """Networks with almost equal numbers of parameters; the ratio network never has more."""
        parameters = parameter_count(dimensions, dimensions, WIDTH, DEPTH)
        width = matched_width(dimensions, 1 + energy * dimensions, DEPTH, parameters)
        return (
            (EnergyRatios if energy else Ratios)(self.seeds, dimensions, width, DEPTH, generator),
            Denoisers(self.seeds, dimensions, WIDTH, DEPTH, generator),
        )

    def random(self, *key: int) -> torch.Generator:
        seed = 0
        for part in key:
            seed = seed * 1000 + part
        return torch.Generator().manual_seed(seed)

    def data(self, dimensions: int) -> Mixture:
        return clusters(dimensions, CLUSTERS, STD, self.random(1, dimensions))

    def teachers(
        self, dimensions: int, points: int | None = None, settings: Settings = DENOISER
    ) -> Denoisers:
        """Denoisers of the data, or of ``points`` data points drawn for each training."""
        generator = self.random(2, dimensions)
        data = single(self.data(dimensions)).expand(self.seeds)
        _, teacher = self.networks(dimensions, generator)
        train_denoiser(teacher, _source(data, points, generator), self.settings(settings), generator)
        teacher.requires_grad_(False)
        return teacher

    def scores(self) -> Iterator[Row]:
        for dimensions in DIMENSIONS:
            teacher = self.teachers(dimensions)
            for pair, make in PAIRS.items():
                generator = self.random(3, dimensions, len(pair))
                data, made = self.data(dimensions), make(self.data(dimensions), generator)
                ratio, student = self.estimators(data, made, teacher, None, RATIO, generator)
                for row in self.score_rows(data, made, ratio, student, teacher, generator):
                    yield {"dimensions": dimensions, "pair": pair, "setting": "base"} | row

    def few_data(self) -> Iterator[Row]:
        """16 dimensions with few data points, and regularization against overfitting."""
        teacher = self.teachers(16, FEW)
        settings = {
            "256 data points": RATIO,
            "256 points, weight decay 1": replace(RATIO, decay=1.0),
            "256 points, gradient penalty 0.1": replace(RATIO, penalty=0.1),
        }
        for name, options in settings.items():
            generator = self.random(3, 16, len("near"))
            data, made = self.data(16), near(self.data(16), generator)
            ratio, student = self.estimators(data, made, teacher, FEW, options, generator)
            for row in self.score_rows(data, made, ratio, student, teacher, generator):
                if name == "256 data points" or row["method"] == "DiffRatio":
                    yield {"dimensions": 16, "pair": "near", "setting": name} | row

    def estimators(
        self,
        data: Mixture,
        made: Mixture,
        teacher: Denoisers,
        points: int | None,
        settings: Settings,
        generator: torch.Generator,
    ) -> tuple[Ratios, Denoisers]:
        """Train ratio networks and students (initialized from the teachers) for these two laws."""
        real, fake = (single(m).expand(self.seeds) for m in (data, made))
        ratio, student = self.networks(data.dimensions, generator)
        train_ratio(
            ratio,
            _source(real, points, generator),
            _source(fake, None, generator),
            self.settings(settings),
            generator,
        )
        student.copy_(teacher)
        train_denoiser(student, _source(fake, None, generator), self.settings(DENOISER), generator)
        return ratio, student

    def score_rows(
        self,
        data: Mixture,
        made: Mixture,
        ratio: Ratios,
        student: Denoisers,
        teacher: Denoisers,
        generator: torch.Generator,
    ) -> Iterator[Row]:
        """Errors of every method at every noise level, at points of the noised generator."""
        for sigma in LEVELS:
            x = made.noised(sigma).sample(POINTS, generator)
            log_ratio, exact = exact_slope(data, made, x, torch.full((POINTS,), sigma).double())
            many, level = x.float().expand(self.seeds, -1, -1), torch.full((self.seeds, POINTS), sigma)
            found, slope = (value.double() for value in ratio.slope(many, level))
            rms = float(exact.square().sum(-1).mean().sqrt())

            def row(method: str, estimates: Tensor, target: Tensor, **more: Any) -> Row:
                about = {"sigma": sigma, "method": method, "exact_rms": rms}  # noqa: B023
                return about | more | decompose(estimates, target)

            for name, divergence in DIVERGENCES.items():
                estimate = divergence.factor(found)[0][..., None] * slope
                target = divergence.factor(log_ratio)[0][..., None] * exact
                yield row("DiffRatio", estimate, target, divergence=name)
            with torch.no_grad():
                student_x0 = student(many, level).double()
                teacher_x0 = teacher(many, level).double()
            learned = (teacher_x0 - student_x0) / sigma**2
            yield row("VSD, learned teacher", learned, exact, divergence="reverse_kl")
            truth = data.denoised(x, torch.full((POINTS,), sigma).double())
            yield row("VSD, exact teacher", (truth - student_x0) / sigma**2, exact, divergence="reverse_kl")

    def train(self, dimensions: int, recipe: Recipe, teacher: Denoisers, name: str) -> Row:
        """Train one recipe to the end; initial generators are contracted by half, too wide and perturbed."""
        generator = self.random(4, dimensions)
        data = single(self.data(dimensions)).expand(self.seeds)
        noise = torch.randn(data.means.shape, generator=generator)
        start = Mixture(data.weights, 0.4 * data.means + 0.1 * noise, torch.full_like(data.stds, 0.35))
        ratio, student = self.networks(dimensions, generator, energy=recipe.energy)
        networks: Ratios | Denoisers | None = None
        if recipe.method == "diffratio":
            networks = ratio
        elif recipe.method != "exact":
            networks = student
            student.copy_(teacher)
        began = time.process_time()
        steps = self.steps(STEPS)
        outcome = train_generators(
            recipe, data, start, networks,
            teacher if recipe.method == "vsd" else None,
            steps=steps, every=max(1, steps // 10), generator=generator,
        )  # fmt: skip
        return {
            "dimensions": dimensions, "recipe": name, "steps": outcome.steps, **outcome.figures,
            "seconds": time.process_time() - began,
        }  # fmt: skip

    def training(self) -> Iterator[Row]:
        for dimensions in DIMENSIONS:
            teacher = self.teachers(dimensions)
            for name in RECIPES if dimensions == 2 else IN_MANY_DIMENSIONS:
                yield self.train(dimensions, RECIPES[name], teacher, name)

    def switches(self) -> Iterator[Row]:
        for dimensions in SWITCH_DIMENSIONS:
            teachers = {
                stable: self.teachers(dimensions, settings=replace(DENOISER, stable=stable))
                for stable in (False, True)
            }
            for name, recipe in SWITCHES.items():
                yield self.train(dimensions, recipe, teachers[recipe.online.stable], name)

    def knobs(self) -> Iterator[Row]:
        teacher = self.teachers(16)
        for name, recipe in KNOBS.items():
            yield self.train(16, recipe, teacher, name)


def _source(mixture: Mixture, points: int | None, generator: torch.Generator) -> Callable[[int], Tensor]:
    """Draws from a law, or from ``points`` fixed points of it."""
    if points is None:
        return lambda count: mixture.sample(count, generator)
    fixed = mixture.sample(points, generator)

    def draw(count: int) -> Tensor:
        chosen = torch.randint(points, (len(fixed), count), generator=generator)
        return fixed.gather(1, chosen[..., None].expand(-1, -1, fixed.shape[2]))

    return draw


def weighted_errors(rows: list[Row], pair: str) -> list[Row]:
    """Relative error of the gradient summed over noise levels, for each weight w(sigma)."""
    found = []
    for dimensions in DIMENSIONS:
        for method in dict.fromkeys(row["method"] for row in rows):
            chosen = [
                row
                for row in rows
                if (row["dimensions"], row["pair"], row["method"], row["divergence"], row["setting"])
                == (dimensions, pair, method, "reverse_kl", "base")
            ]
            for name, weight in WEIGHTS.items():
                size = [
                    (float(weight(torch.tensor(row["sigma"]), SIGMA_DATA)) * row["exact_rms"]) ** 2
                    for row in chosen
                ]
                error2 = sum(s * row["error2"] for s, row in zip(size, chosen, strict=True)) / sum(size)
                found.append(
                    {"dimensions": dimensions, "pair": pair, "method": method, "weight": name}
                    | {"relative_error": error2**0.5}
                )
    return found


PARTS = ("scores", "training", "knobs", "switches")


def main(argv: list[str]) -> int:
    from benchmarks.studies import bias_figures

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
