"""Part ``settings`` of ``benchmarks.studies.bias_study``: many data sets, with rates chosen on others.

Every method trains as many networks' updates in total: DiffRatio two ratio steps per generator step, score
distillation one step of the student and, beforehand, as many of the teacher. Rates and weight of each method
are those with the least mean distance on the data of ``HELD_OUT``, which is not reported.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.studies.bias_parts import (
    DENOISER,
    DIFFRATIO,
    FEW,
    ONLINE_RATIO,
    STD,
    STEPS,
    VSD,
    WIDTH,
    Row,
    Study,
)
from benchmarks.studies.bias_training import Recipe
from benchmarks.studies.mixtures import Mixture, clusters, elongated

METHODS: dict[str, Recipe] = {
    "DiffRatio, before": replace(
        DIFFRATIO, energy=False, online=replace(ONLINE_RATIO, shared=False), online_steps=2
    ),
    "DiffRatio": replace(DIFFRATIO, online_steps=2),
    "DiffRatio, matched pairs": replace(
        DIFFRATIO, online=replace(ONLINE_RATIO, matched=True), online_steps=2
    ),
    "score distillation": VSD,
}
"""*Before* is with separate noise and a scalar head."""

ONLINE_RATES = (3e-3, 1e-2)
GENERATOR_RATES = (1e-3, 3e-3)
CHOSEN_WEIGHTS = ("bounded", "sigma2")
CHOICE_SEEDS = 4


@dataclass(frozen=True)
class Setting:
    """A data set and the sizes of networks; ``points`` and the teacher's options make it hard."""

    dimensions: int = 16
    clusters: int = 8
    elongation: float = 1.0
    width: int = WIDTH
    points: int | None = None
    teacher_width: int | None = None
    teacher_steps: int = STEPS

    def data(self, study: Study) -> Mixture:
        generator = study.random(1, self.dimensions, self.clusters)
        return elongated(clusters(self.dimensions, self.clusters, STD, generator), STD, self.elongation)


HELD_OUT: dict[str, Setting] = {
    "12 dimensions, 6 clusters": Setting(12, 6),
    "40 dimensions, 12 clusters": Setting(40, 12),
}
SETTINGS: dict[str, Setting] = {
    "2 dimensions": Setting(2),
    "8 dimensions": Setting(8),
    "16 dimensions": Setting(),
    "32 dimensions": Setting(32),
    "64 dimensions": Setting(64),
    "5 clusters": Setting(clusters=5),
    "20 clusters": Setting(clusters=20),
    "elongated 8 : 1": Setting(elongation=8.0),
    "networks half as wide": Setting(width=WIDTH // 2),
    "networks twice as wide": Setting(width=2 * WIDTH),
    f"{FEW} data points": Setting(points=FEW),
    "teacher of a tenth of the steps": Setting(teacher_steps=STEPS // 10),
    "teacher a quarter as wide": Setting(teacher_width=WIDTH // 4),
}
"""16 dimensions and 8 clusters where the name does not say otherwise."""


def outcomes(study: Study, setting: Setting, recipes: dict[str, Recipe]) -> Iterator[Row]:
    """Train every recipe on the data of ``setting``, score distillation with one teacher for all."""
    data = setting.data(study)
    sized = replace(study, width=setting.width)
    teaching = replace(study, width=setting.teacher_width or setting.width)
    teacher = teaching.teachers(
        setting.dimensions, setting.points, replace(DENOISER, steps=setting.teacher_steps), data
    )
    for name, recipe in recipes.items():
        recipe = replace(recipe, data_points=setting.points)
        yield sized.train(setting.dimensions, recipe, teacher, name, data)


def choices(study: Study) -> Iterator[Row]:
    """The final distance of each method with each choice of rates and weight, on ``HELD_OUT``."""
    few = replace(study, seeds=min(CHOICE_SEEDS, study.seeds))
    for name, setting in HELD_OUT.items():
        for method, recipe in METHODS.items():
            for online, made, weight in itertools.product(ONLINE_RATES, GENERATOR_RATES, CHOSEN_WEIGHTS):
                tried = {method: varied(recipe, online, made, weight)}
                for row in outcomes(few, setting, tried):
                    about = {"setting": name, "online": online, "generator": made, "weight": weight}
                    yield row | about | {"held_out": True}


def varied(recipe: Recipe, online: float, made: float, weight: str) -> Recipe:
    return replace(recipe, online=replace(recipe.online, rate=online), generator_rate=made, weight=weight)


def chosen(rows: list[Row], method: str) -> tuple[float, float, str]:
    """(online rate, generator rate, weight) of ``method`` with the least mean of distances relative to each
    held-out data set's least, over the rows of ``choices``."""
    tried: dict[tuple[float, float, str], list[float]] = {}
    for setting in dict.fromkeys(row["setting"] for row in rows):
        ends = {
            (row["online"], row["generator"], row["weight"]): statistics.mean(row["sliced_wasserstein"][-1])
            for row in rows
            if (row["setting"], row["recipe"]) == (setting, method)
        }
        for choice, end in ends.items():
            tried.setdefault(choice, []).append(end / min(ends.values()))
    return min(tried, key=lambda choice: statistics.mean(tried[choice]))


def settings(study: Study) -> Iterator[Row]:
    """The rows of ``choices``, then every method with its choice in every setting."""
    tried = []
    for row in choices(study):
        tried.append(row)
        yield row
    recipes = {name: varied(recipe, *chosen(tried, name)) for name, recipe in METHODS.items()}
    for name, setting in SETTINGS.items():
        for row in outcomes(study, setting, recipes):
            recipe = recipes[row["recipe"]]
            about: dict[str, Any] = {
                "setting": name, "online": recipe.online.rate, "generator": recipe.generator_rate,
                "weight": recipe.weight, "held_out": False,
            }  # fmt: skip
            yield row | about
