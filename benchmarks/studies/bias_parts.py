"""Parts of ``benchmarks.studies.bias_study``: errors of score differences, and generators trained."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
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
from benchmarks.studies.mixtures import Mixture, clusters
from benchmarks.studies.score_estimators import Settings, train_denoiser, train_ratio
from diffratio_fast.data.scaling import SIGMA_DATA
from diffratio_fast.divergences import DIVERGENCES
from diffratio_fast.objectives.weights import WEIGHTS

Row = dict[str, Any]

DIMENSIONS = (2, 16, 64)
CLUSTERS, STD = 8, 0.2
SEEDS = 8
STEPS = 1000
WIDTH, DEPTH = 48, 3
LEVELS = (0.05, 0.1, 0.2, 0.4, 0.8, 1.6, 3.2)
POINTS = 2048
RATIO = Settings(STEPS, rate=5e-3, shared=True)
SEPARATE = replace(RATIO, shared=False)
DENOISER = Settings(STEPS, rate=1e-2, stable=True)
"""The best of 2e-3, 5e-3 and 1e-2 for each kind, in 16 dimensions."""
FEW = 256
"""Number of data points in the case of few data."""

ONLINE_RATIO = Settings(0, rate=1e-2, beta1=0.0, shared=True)
ONLINE_STUDENT = Settings(0, rate=3e-3, beta1=0.0, stable=True)
DIFFRATIO = Recipe(weight="bounded", online=ONLINE_RATIO, generator_rate=2e-3, energy=True)
VSD = Recipe(method="vsd", weight="sigma2", online=ONLINE_STUDENT, generator_rate=2e-3)
"""Rates and weights are those that the part ``choices`` finds, on data that no other part reports."""
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
_SEPARATE = replace(DIFFRATIO, energy=False, online=replace(ONLINE_RATIO, shared=False))
_MATCHED = replace(DIFFRATIO, online=replace(ONLINE_RATIO, matched=True))
SWITCHES: dict[str, Recipe] = {
    "DiffRatio, separate noise": _SEPARATE,
    "+ shared noise": replace(_SEPARATE, online=ONLINE_RATIO),
    "+ energy head": DIFFRATIO,
    "+ matched pairs": _MATCHED,
    "+ 2 ratio steps": replace(_MATCHED, online_steps=2),
    "VSD, plain targets": replace(VSD, online=replace(ONLINE_STUDENT, stable=False)),
    "VSD, stable targets": VSD,
}
"""One switch after another, all with one generator rate; the teacher has the targets of the student."""


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
    width: int = WIDTH

    def steps(self, count: int) -> int:
        return max(2, round(count * self.scale))

    def settings(self, settings: Settings) -> Settings:
        return replace(settings, steps=self.steps(settings.steps))

    def networks(
        self, dimensions: int, generator: torch.Generator, *, energy: bool = False
    ) -> tuple[Ratios, Denoisers]:
        """Networks with almost equal numbers of parameters; the ratio network never has more."""
        parameters = parameter_count(dimensions, dimensions, self.width, DEPTH)
        width = matched_width(dimensions, 1 + energy * dimensions, DEPTH, parameters)
        return (
            (EnergyRatios if energy else Ratios)(self.seeds, dimensions, width, DEPTH, generator),
            Denoisers(self.seeds, dimensions, self.width, DEPTH, generator),
        )

    def random(self, *key: int) -> torch.Generator:
        seed = 0
        for part in key:
            seed = seed * 1000 + part
        return torch.Generator().manual_seed(seed)

    def data(self, dimensions: int) -> Mixture:
        return clusters(dimensions, CLUSTERS, STD, self.random(1, dimensions))

    def teachers(
        self,
        dimensions: int,
        points: int | None = None,
        settings: Settings = DENOISER,
        data: Mixture | None = None,
    ) -> Denoisers:
        """Denoisers of the data, or of ``points`` data points drawn for each training."""
        generator = self.random(2, dimensions)
        data = single(self.data(dimensions) if data is None else data).expand(self.seeds)
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
                ratios = {"DiffRatio": (RATIO, True), "DiffRatio, before": (SEPARATE, False)}
                estimators = self.estimators(data, made, teacher, None, ratios, generator)
                for row in self.score_rows(data, made, *estimators, teacher, generator):
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
            ratios = {"DiffRatio": (options, True)}
            estimators = self.estimators(data, made, teacher, FEW, ratios, generator)
            for row in self.score_rows(data, made, *estimators, teacher, generator):
                if name == "256 data points" or row["method"] == "DiffRatio":
                    yield {"dimensions": 16, "pair": "near", "setting": name} | row

    def estimators(
        self,
        data: Mixture,
        made: Mixture,
        teacher: Denoisers,
        points: int | None,
        settings: dict[str, tuple[Settings, bool]],
        generator: torch.Generator,
    ) -> tuple[dict[str, Ratios], Denoisers]:
        """Trained ratio networks, by name (options, energy head), and students that begin as the teachers."""
        real, fake = (single(m).expand(self.seeds) for m in (data, made))
        ratios = {}
        for name, (options, energy) in settings.items():
            ratios[name], student = self.networks(data.dimensions, generator, energy=energy)
            train_ratio(
                ratios[name],
                _source(real, points, generator),
                _source(fake, None, generator),
                self.settings(options),
                generator,
            )
        student.copy_(teacher)
        train_denoiser(student, _source(fake, None, generator), self.settings(DENOISER), generator)
        return ratios, student

    def score_rows(
        self,
        data: Mixture,
        made: Mixture,
        ratios: dict[str, Ratios],
        student: Denoisers,
        teacher: Denoisers,
        generator: torch.Generator,
    ) -> Iterator[Row]:
        """Errors of every method at every noise level, at points of the noised generator."""
        for sigma in LEVELS:
            x = made.noised(sigma).sample(POINTS, generator)
            log_ratio, exact = exact_slope(data, made, x, torch.full((POINTS,), sigma).double())
            many, level = x.float().expand(self.seeds, -1, -1), torch.full((self.seeds, POINTS), sigma)
            rms = float(exact.square().sum(-1).mean().sqrt())

            def row(method: str, estimates: Tensor, target: Tensor, **more: Any) -> Row:
                about = {"sigma": sigma, "method": method, "exact_rms": rms}  # noqa: B023
                return about | more | decompose(estimates, target)

            for method, ratio in ratios.items():
                found, slope = (value.double() for value in ratio.slope(many, level))
                for name, divergence in DIVERGENCES.items():
                    if method == "DiffRatio" or name == "reverse_kl":
                        estimate = divergence.factor(found)[0][..., None] * slope
                        target = divergence.factor(log_ratio)[0][..., None] * exact
                        yield row(method, estimate, target, divergence=name)
            with torch.no_grad():
                student_x0 = student(many, level).double()
                teacher_x0 = teacher(many, level).double()
            learned = (teacher_x0 - student_x0) / sigma**2
            yield row("VSD, learned teacher", learned, exact, divergence="reverse_kl")
            truth = data.denoised(x, torch.full((POINTS,), sigma).double())
            yield row("VSD, exact teacher", (truth - student_x0) / sigma**2, exact, divergence="reverse_kl")

    def train(
        self, dimensions: int, recipe: Recipe, teacher: Denoisers, name: str, data: Mixture | None = None
    ) -> Row:
        """Train one recipe to the end; initial generators are contracted by half, too wide and perturbed."""
        generator = self.random(4, dimensions)
        data = single(self.data(dimensions) if data is None else data).expand(self.seeds)
        noise = torch.randn(data.means.shape, generator=generator)
        start = Mixture(data.weights, 0.4 * data.means + 0.1 * noise, torch.full_like(data.stds, 0.35))
        ratio, student = self.networks(dimensions, generator, energy=recipe.energy)
        networks: Ratios | Denoisers | None = None
        if recipe.method == "diffratio":
            networks = ratio
        elif recipe.method != "exact":
            networks = student
            if student.width == teacher.width:
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
    """Squared error, bias and variance of the gradient summed over noise levels, for each weight w(sigma)."""
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
                parts = {
                    part: sum(s * row[part] for s, row in zip(size, chosen, strict=True)) / sum(size)
                    for part in ("error2", "bias2", "variance")
                }
                found.append(
                    {"dimensions": dimensions, "pair": pair, "method": method, "weight": name} | parts
                )
    return found
