"""Details of a run, folded on the page: noise levels, calibration, time and memory, configuration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from diffratio_fast.report.charts import Axis, Series, bar_chart, line_chart, number
from diffratio_fast.report.html import SIGMA, STEP, charts, details, over_time
from diffratio_fast.report.run_files import RunFiles


def by_sigma(run: RunFiles) -> str:
    """Divergence, accuracy, slope and share of the gradient by noise level."""
    if not run.measured:
        return ""
    last = run.measured[-1]

    def of(name: str, label: str, style: str, sigma: str = "sigma") -> Series:
        values = last.get(name, [])
        return Series(label, list(zip(last.get(sigma, []), values, strict=False)), style)

    return details(
        f"By noise level, at step {last['step']:,}",
        charts(
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


def calibration(run: RunFiles) -> str:
    """Reliability of the ratio networks on validation data."""
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
    return details(
        "Calibration for the averaged generator",
        charts(
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


def noise_levels(run: RunFiles) -> str:
    """Histograms of the noise laws."""
    laws = run.measurements.get("noise_levels") or {}
    if not laws:
        return ""
    edges = laws["edges"]
    series = [
        Series(label, list(zip(edges, laws[name], strict=False)), style)
        for name, label, style in (("ratio", "ratio network", "s0"), ("generator", "generator", "s1"))
    ]
    return details("Noise levels", charts(bar_chart("Laws of σ", edges, series, SIGMA, Axis("share"))))


def cost(run: RunFiles) -> str:
    """Speed and memory over the run."""
    mebibytes = Series(
        "peak",
        [(line["step"], line["memory_bytes"] / 2**20) for line in run.logged if line.get("memory_bytes")],
        "s3",
    )
    spent = sum(line.get("evaluation_seconds") or 0 for line in run.measured)
    total = run.logged[-1].get("seconds") or 0 if run.logged else 0
    text = f"{total:,.0f} s in total, including {spent:,.0f} s in evaluations." if total else ""
    return details(
        "Time and memory",
        charts(
            line_chart(
                "Images per second",
                [over_time(run.logged, "images_per_second", "with logging and evaluation", "s0")],
                STEP,
                Axis("images / s", low=0.0),
            ),
            line_chart("Peak memory", [mebibytes], STEP, Axis("MiB", low=0.0)),
        ),
        text,
    )


def configuration(run: RunFiles) -> str:
    """Options and environment."""
    settings = {**run.config}
    environment = settings.pop("environment", None) or {}

    def table(values: dict[str, Any]) -> str:
        rows = "".join(
            f"<tr><td>{escape(str(k))}</td><td>{escape(str(v))}</td></tr>" for k, v in values.items()
        )
        return f'<table class="wide"><tbody>{rows}</tbody></table>'

    if not settings:
        return ""
    return details(
        "Configuration",
        f"{table(environment)}<details><summary>all settings</summary>{table(settings)}</details>",
    )
