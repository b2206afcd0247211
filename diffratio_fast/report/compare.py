"""A page that compares several runs: a table of their results and their curves in shared charts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from diffratio_fast.report.charts import Axis, Series, line_chart, number
from diffratio_fast.report.html import STEP, charts, picture, section
from diffratio_fast.report.page import document
from diffratio_fast.report.run_files import RunFiles, read
from diffratio_fast.storage.writing import replace_file

COLUMNS = (
    ("frechet_distance", "Fréchet distance"),
    ("frechet_distance_floor", "floor"),
    ("class_accuracy", "class accuracy"),
    ("divergence_refit", "divergence after a refit"),
    ("validation_error", "weighted error"),
    ("steps", "steps"),
    ("images", "images"),
    ("seconds", "seconds"),
)
CURVES = (
    ("frechet_distance_validation", "Fréchet distance to validation data", Axis("distance", log=True)),
    ("class_accuracy_validation", "Class accuracy", Axis("accuracy", high=1.0)),
    ("divergence_refit", "Divergence after a refit", Axis("nats")),
    ("validation_error", "Weighted error of the denoiser", Axis("error", log=True)),
)


def compare(roots: Sequence[Path], out: Path) -> Path:
    """Write the comparison of the run directories ``roots`` to ``out`` and return its path."""
    runs = [read(root) for root in roots]
    names = [root.resolve().name for root in roots]
    if len(set(names)) < len(names):
        names = [str(root) for root in roots]
    sections = [_results(runs, names), _curves(runs, names), _options(runs, names), _samples(runs, names)]
    replace_file(out, document(f"{len(runs)} runs", sections))
    return out


def _results(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    shown = [(key, title) for key, title in COLUMNS if any(run.summary.get(key) is not None for run in runs)]
    head = "".join(f"<th>{escape(title)}</th>" for _, title in shown)
    rows = "".join(
        f'<tr><td><i class="key s{i % 8}"></i>{escape(name)}{"" if run.summary else " (not finished)"}</td>'
        + "".join(f"<td>{_cell(run.summary.get(key))}</td>" for key, _ in shown)
        + "</tr>"
        for i, (run, name) in enumerate(zip(runs, names, strict=True))
    )
    table = f"<table><thead><tr><th>run</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section("Results", f'<div class="scroll">{table}</div>')


def _cell(value: object) -> str:
    return number(value) if isinstance(value, (int, float)) else ""


def _curves(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    found, timed = [], []
    for key, title, axis in CURVES:
        by_step, by_time = [], []
        for i, (run, name) in enumerate(zip(runs, names, strict=True)):
            lines = [line for line in run.evaluated if line.get(key) is not None]
            by_step.append(Series(name, [(line["step"], line[key]) for line in lines], f"s{i % 8}"))
            seconds = {line["step"]: float(line.get("seconds") or 0) for line in run.logged}
            points = [(seconds[line["step"]], line[key]) for line in lines if line["step"] in seconds]
            by_time.append(Series(name, points, f"s{i % 8}"))
        found.append(line_chart(title, by_step, STEP, axis))
        timed.append(line_chart(f"{title}, over time", by_time, Axis("seconds"), axis))
    return section("Over steps", charts(*found)) + section("Over time", charts(*timed))


def _options(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    """The options in which the runs differ."""
    keys = [key for key in dict.fromkeys(key for run in runs for key in run.config) if key != "environment"]
    differing = [key for key in keys if len({str(run.config.get(key)) for run in runs}) > 1]
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    rows = "".join(
        f"<tr><td>{escape(str(key))}</td>"
        + "".join(f"<td>{escape(str(run.config.get(key, '')))}</td>" for run in runs)
        + "</tr>"
        for key in differing
    )
    if not rows:
        return ""
    table = f"<table><thead><tr><th>option</th>{head}</tr></thead><tbody>{rows}</tbody></table>"
    return section("Options that differ", f'<div class="scroll">{table}</div>')


def _samples(runs: Sequence[RunFiles], names: Sequence[str]) -> str:
    parts = [
        f"<figure><figcaption>{escape(name)}, step {run.grids[-1][0]:,}</figcaption>"
        f"{picture(run.grids[-1][1], name)}</figure>"
        for run, name in zip(runs, names, strict=True)
        if run.grids
    ]
    return section("Newest samples", charts(*parts))
