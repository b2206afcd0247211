"""The page: its sections in order; a section without data is empty."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from diffratio_fast.errors import UserError
from diffratio_fast.report.charts import Axis, Series, bar_chart, line_chart, number
from diffratio_fast.report.diagnosis import warnings
from diffratio_fast.report.run_files import RunFiles, read
from diffratio_fast.report.style import SCRIPT, STYLE
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import DAMAGE, one_line
from diffratio_fast.storage.writing import replace_file

STEP = Axis("step")
SIGMA = Axis("noise level σ", log=True)
_SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_SCRIPT_DIGEST}'; base-uri 'none'; form-action 'none'"
)
"""The browser fetches nothing, and runs this one script and no other."""


def write(root: Path, summary: dict[str, Any] | None = None) -> Path:
    """Write ``root``/report.html from the run's other files; its path.

    ``summary`` is that of a run that is about to finish: its file is written last.
    """
    path = RunPaths(root).report
    try:
        run = read(root)
        content = page(run if summary is None else replace(run, summary=summary))
    except DAMAGE as error:
        raise UserError(
            f"{root}: damaged metrics ({one_line(error)}); no report was written; restore the files"
        ) from error
    replace_file(path, content)
    return path


def page(run: RunFiles) -> str:
    """The page as HTML."""
    title = f"{run.config.get('preset', 'run')}: {run.root.resolve().name}"
    sections = [
        _overview(run), _evaluations(run), _samples(run), _neighbors(run), _divergence(run), _by_sigma(run),
        _training(run), _calibration(run), _noise(run), _cost(run), _configuration(run),
    ]  # fmt: skip
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{chr(10).join(section for section in sections if section)}\n<script>{SCRIPT}</script>\n"
        "</body>\n</html>\n"
    )


def _section(title: str, content: str, text: str = "") -> str:
    if not content:
        return ""
    message = f'<p class="soft">{escape(text)}</p>' if text else ""
    return f"<section><h2>{escape(title)}</h2>{message}{content}</section>"


def _charts(*charts: str) -> str:
    there = "".join(charts)
    return f'<div class="charts">{there}</div>' if there else ""


def _over_time(lines: Sequence[dict[str, Any]], name: str, label: str, style: str) -> Series:
    return Series(label, [(line["step"], line[name]) for line in lines if name in line], style)


def _picture(png: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _overview(run: RunFiles) -> str:
    steps, summary = run.config.get("steps"), run.summary
    state = (
        f"finished at step {run.step:,}" if summary else f"step {run.step:,} of {steps or 0:,}, not finished"
    )
    tiles: list[tuple[str, Any, str]] = [
        ("Fréchet distance to test data", summary.get("frechet_distance"),
         f"of {summary.get('evaluation_images') or 0:,} images; training data: "
         f"{number(summary.get('frechet_distance_floor') or 0)}"),
        ("class accuracy", summary.get("class_accuracy"),
         f"test data: {number(summary.get('class_accuracy_test') or 0)}"),
    ]  # fmt: skip
    if run.evaluated:
        error = run.evaluated[-1].get("validation_error")
        tiles.append(("weighted error, validation", error, "of the averaged denoiser"))
    if run.measured:
        last = run.measured[-1]
        if not summary:
            tiles.append(("Fréchet distance, validation", last.get("frechet_distance_validation"), ""))
        tiles.append(("divergence, nats", last.get("divergence"), "bound of the online ratio network"))
        tiles.append(("divergence after a refit", last.get("divergence_refit"), "the convergence signal"))
    if run.logged:
        last = run.logged[-1]
        tiles.append(("images per second", last.get("images_per_second"), ""))
        tiles.append(("minutes", (last.get("seconds") or 0) / 60, ""))
        tiles.append(("peak memory, MiB", (last.get("memory_bytes") or 0) / 2**20, ""))
    cells = "".join(
        f'<div class="tile"><span>{escape(name)}</span><b>{number(value)}</b>'
        f"<span>{escape(note)}</span></div>"
        for name, value, note in tiles
        if value is not None
    )
    after = int(run.config.get("ratio_warmup_steps") or 0) + int(run.config.get("generator_ramp_steps") or 0)
    message = "".join(
        f'<p class="warning">Warning: {escape(text)}</p>'
        for _, text in warnings([*run.logged, *run.measured], after=after)
    )
    return f'<p class="soft">{escape(state)}</p><div class="tiles">{cells}</div>{message}'


def _evaluations(run: RunFiles) -> str:
    parts = []
    for row in run.measurements.get("evaluations") or []:
        cells = "".join(
            f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{number(value)}</td></tr>"
            for name, value in row["figures"].items()
            if value is not None
        )
        seeds = len(row["seeds"] or [0])
        heading = f"{row['features']}, against {row['reference']}: {row['count']:,} images"
        heading += f", mean of {seeds} seeds" if seeds > 1 else ""
        parts.append(
            f'<div class="scroll"><table><caption>{escape(heading)}</caption><tbody>{cells}</tbody></table>'
            "</div>"
        )
    return _section("Evaluation", _charts(*parts))


def _samples(run: RunFiles) -> str:
    if not run.grids:
        return ""
    pictures = "".join(_picture(png, f"step {step:,}") for step, png in run.grids)
    last = len(run.grids) - 1
    return _section(
        "Samples over time",
        f'<p id="shown">step {run.grids[-1][0]:,}</p><input type="range" id="step" min="0" max="{last}" '
        f'value="{last}" aria-label="step" hidden><div id="grids">{pictures}</div>',
        "The same latents through the averaged network.",
    )


def _neighbors(run: RunFiles) -> str:
    if run.neighbors is None:
        return ""
    return _section(
        "Nearest training images",
        _picture(run.neighbors, "samples and their nearest training images"),
        "Each row begins with a generated image, followed by its nearest training images in pixel space. "
        "Memorized training images would be visible here.",
    )


def _divergence(run: RunFiles) -> str:
    nats = Axis("nats")
    smooth = [
        _over_time(run.logged, "divergence_train", "training data", "s1"),
        _over_time(run.logged, "divergence", "validation data", "s0"),
        _over_time(run.measured, "divergence_refit", "validation, after a refit", "s2"),
    ]
    levels = run.measured[-1]["sigma"] if run.measured else []

    def by_level(name: str) -> list[Series]:
        return [
            Series(
                f"σ = {number(sigma)}",
                [(line["step"], line[name][i]) for line in run.measured if len(line.get(name, ())) > i],
                f"s{i % 8}",
            )
            for i, sigma in enumerate(levels)
        ]

    return _section(
        "Divergence",
        _charts(
            line_chart("Bound on the Jensen-Shannon divergence", smooth, STEP, nats),
            line_chart("By noise level, validation data", by_level("divergence_by_sigma"), STEP, nats),
            line_chart("By noise level, after a refit", by_level("divergence_refit_by_sigma"), STEP, nats),
        ),
        "A lower bound that depends on the ratio network: at most 0 for equal distributions, at most 0.69 "
        "for "
        "disjoint ones; below 0 the network is worse than a constant. A training bound above the validation "
        "bound means overfitting. After a refit against the averaged generator the bound is tighter and "
        "measures the convergence of the generator.",
    )


def _by_sigma(run: RunFiles) -> str:
    if not run.measured:
        return ""
    last = run.measured[-1]

    def of(name: str, label: str, style: str, sigma: str = "sigma") -> Series:
        values = last.get(name, [])
        return Series(label, list(zip(last.get(sigma, []), values, strict=False)), style)

    return _section(
        f"By noise level, at step {last['step']:,}",
        _charts(
            line_chart(
                "Bound on the divergence",
                [
                    of("divergence_train_by_sigma", "training data", "s1"),
                    of("divergence_by_sigma", "validation data", "s0"),
                    of("divergence_refit_by_sigma", "validation, after a refit", "s2"),
                ],
                SIGMA,
                Axis("nats"),
            ),
            line_chart(
                "Accuracy of the ratio network",
                [of("ratio_accuracy_by_sigma", "validation data", "s0")],
                SIGMA,
                Axis("accuracy", high=1.0),
                "Near 1 the network is saturated: its gradient is a weak signal.",
            ),
            line_chart(
                "Weighted error of the student at generated images",
                [of("student_error_by_sigma", "fresh images", "s0")],
                SIGMA,
                Axis("error", log=True),
            ),
            line_chart(
                "Slope |∇ℓ| at generated images",
                [of("log_ratio_gradient_by_sigma", "mean norm", "s3", "generator_sigma")],
                SIGMA,
                Axis("|∇ℓ|", log=True),
            ),
            line_chart(
                "Share of the generator's gradient",
                [of("generator_gradient_share", "share", "s5", "generator_sigma")],
                SIGMA,
                Axis("share", low=0.0),
            ),
        ),
    )


def _training(run: RunFiles) -> str:
    logged = run.logged
    return _section(
        "Training",
        _charts(
            line_chart(
                "Loss of the denoiser",
                [_over_time(logged, "loss", "training batches", "s1")],
                STEP,
                Axis("loss"),
            ),
            line_chart(
                "Weighted error of the denoiser",
                [
                    _over_time(logged, "error", "training batches", "s1"),
                    _over_time(run.evaluated, "validation_error", "average, validation data", "s0"),
                ],
                STEP,
                Axis("error", log=True),
            ),
            line_chart(
                "Fréchet distance to validation data",
                [_over_time(run.measured, "frechet_distance_validation", "averaged generator", "s0")],
                STEP,
                Axis("distance", log=True),
            ),
            line_chart(
                "Loss of the student",
                [_over_time(logged, "student_loss", "generated images", "s1")],
                STEP,
                Axis("loss"),
            ),
            line_chart(
                "Loss of the ratio network",
                [_over_time(logged, "ratio_loss", "training batches", "s1")],
                STEP,
                Axis("loss, nats"),
                "2 log 2 = 1.386 is the loss of a constant log ratio of 0.",
            ),
            line_chart(
                "Accuracy of the ratio network",
                [_over_time(logged, "ratio_accuracy", "training batches", "s1")],
                STEP,
                Axis("accuracy"),
            ),
            line_chart(
                "Mean log ratio",
                [
                    _over_time(logged, "log_ratio_real", "real", "s0"),
                    _over_time(logged, "log_ratio_fake", "generated", "s1"),
                ],
                STEP,
                Axis("ℓ"),
            ),
            line_chart(
                "Norm of the gradient",
                [_over_time(logged, "gradient_norm", "norm", "s3")],
                STEP,
                Axis("norm", log=True),
            ),
            line_chart(
                "Learning rates",
                [
                    _over_time(logged, "generator_lr", "generator", "s0"),
                    _over_time(logged, "ratio_lr", "ratio network", "s1"),
                    _over_time(logged, "lr", "denoiser", "s2"),
                ],
                STEP,
                Axis("rate"),
            ),
        ),
    )


def _calibration(run: RunFiles) -> str:
    found: dict[str, list[dict[str, Any]]] = run.measurements.get("calibration") or {}
    if not found:
        return ""
    styles = {name: f"s{i}" for i, name in enumerate(found)}

    def by_sigma(value: str) -> list[Series]:
        return [
            Series(n, [(row["sigma"], row[value]) for row in rows], styles[n]) for n, rows in found.items()
        ]

    diagrams, options = [], []
    levels = next(iter(found.values()))
    for i, row in enumerate(levels):
        lines = [Series("calibrated", [(0.0, 0.0), (1.0, 1.0)], "ideal")]
        for name, rows in found.items():
            if i < len(rows):  # a bin is (predicted, observed, images)
                points = [(bin[0], bin[1]) for bin in rows[i]["reliability"]]
                lines.append(Series(name, points, styles[name]))
        level = f"σ = {number(row['sigma'])}"
        chart = line_chart(
            f"Reliability at {level}",
            lines,
            Axis("predicted probability of real", low=0.0, high=1.0),
            Axis("share of real", low=0.0, high=1.0),
        )
        diagrams.append(f"<div>{chart}</div>")
        chosen = " selected" if i == len(levels) // 2 else ""
        options.append(f'<option value="{i}"{chosen}>{level}</option>')
    rows_html = "".join(
        f"<tr><td>{escape(name)}</td><td>{number(row['sigma'])}</td><td>{_estimate(row['generated_mean'])}</td>"
        f"<td>{_estimate(row['data_mean'])}</td><td>{_estimate(row['balance'])}</td>"
        f"<td>{number(row['auc'])}</td><td>{number(row['effective_sample_size'])}</td></tr>"
        for name, rows in found.items()
        for row in rows
    )
    table = (
        '<div class="scroll"><table><thead><tr><th>ratio network</th><th>σ</th><th>E_gen e^ℓ (1)</th>'
        "<th>E_data e^−ℓ (1)</th><th>balance (0)</th><th>AUC</th><th>effective share</th></tr></thead>"
        f"<tbody>{rows_html}</tbody></table></div>"
    )
    return _section(
        "Calibration for the averaged generator",
        _charts(
            line_chart("AUC: real against generated", by_sigma("auc"), SIGMA, Axis("AUC")),
            line_chart(
                "Effective sample size of a verifier", by_sigma("effective_sample_size"), SIGMA,
                Axis("share of N", low=0.0, high=1.0),
            ),
        )
        + f'<p><select id="level" aria-label="noise level" hidden>{"".join(options)}</select></p>'
        + f'<div class="charts" id="diagrams">{"".join(diagrams)}</div><p></p>{table}',
        "On validation data. For an exact log ratio the three identities hold within their errors, and "
        "predicted probabilities match observed ones.",
    )  # fmt: skip


def _estimate(pair: Sequence[float | None]) -> str:
    return " ± ".join("∞" if value is None else number(value) for value in pair)


def _noise(run: RunFiles) -> str:
    laws = run.measurements.get("noise_levels") or {}
    if not laws:
        return ""
    edges = laws["edges"]
    series = [
        Series(label, list(zip(edges, laws[name], strict=False)), style)
        for name, label, style in (("ratio", "ratio network", "s0"), ("generator", "generator", "s1"))
    ]
    return _section("Noise levels", _charts(bar_chart("Laws of σ", edges, series, SIGMA, Axis("share"))))


def _cost(run: RunFiles) -> str:
    mebibytes = Series(
        "peak",
        [(line["step"], line["memory_bytes"] / 2**20) for line in run.logged if line.get("memory_bytes")],
        "s3",
    )
    spent = sum(line.get("evaluation_seconds") or 0 for line in run.measured)
    total = run.logged[-1].get("seconds") or 0 if run.logged else 0
    text = f"{total:,.0f} s in total, including {spent:,.0f} s in evaluations." if total else ""
    return _section(
        "Time and memory",
        _charts(
            line_chart(
                "Images per second",
                [_over_time(run.logged, "images_per_second", "with logging and evaluation", "s0")],
                STEP,
                Axis("images / s", low=0.0),
            ),
            line_chart("Peak memory", [mebibytes], STEP, Axis("MiB", low=0.0)),
        ),
        text,
    )


def _configuration(run: RunFiles) -> str:
    settings = {**run.config}
    environment = settings.pop("environment", None) or {}

    def table(values: dict[str, Any]) -> str:
        rows = "".join(
            f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items()
        )
        return f'<table class="wide"><tbody>{rows}</tbody></table>'

    if not settings:
        return ""
    return _section(
        "Configuration",
        f"{table(environment)}<details><summary>all settings</summary>{table(settings)}</details>",
    )
