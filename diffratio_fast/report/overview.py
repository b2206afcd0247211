"""The first screen: a verdict, the newest samples, the headline numbers, warnings."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from diffratio_fast.report.charts import number, sparkline
from diffratio_fast.report.diagnosis import warnings
from diffratio_fast.report.html import charts, picture, section
from diffratio_fast.report.run_files import RunFiles


def overview(run: RunFiles) -> str:
    """Verdict, headline numbers and warnings beside the newest samples."""
    after = int(run.config.get("ratio_warmup_steps") or 0) + int(run.config.get("generator_ramp_steps") or 0)
    found = [text for _, text in warnings([*run.logged, *run.measured], after=after)]
    messages = "".join(f'<p class="warning">Warning: {escape(text)}</p>' for text in found)
    words = f'<p class="verdict">{escape(verdict(run, len(found)))}</p>{_tiles(run)}{messages}'
    return f'<section class="first"><div>{words}</div>{_samples(run)}</section>'


def verdict(run: RunFiles, problems: int) -> str:
    """One sentence each: is it done, is it good, is it healthy."""
    steps = int(run.config.get("steps") or 0)
    if run.summary:
        done = f"Finished at step {run.step:,}."
    else:
        share = f" ({run.step / steps:.0%})" if steps else ""
        done = f"Step {run.step:,} of {steps:,}{share}, not finished."
    health = (
        "No warnings." if not problems else f"{problems} warning{'s' if problems > 1 else ''}: see below."
    )
    return " ".join(part for part in (done, _goodness(run), health) if part)


def _goodness(run: RunFiles) -> str:
    """How near to real images the distance of the finished run is, in multiples of the floor."""
    distance, floor = run.summary.get("frechet_distance"), run.summary.get("frechet_distance_floor")
    if distance is None or not floor:
        values = _trend(run.measured, "frechet_distance_validation")
        if len(values) < 2:
            return ""
        if values[-1] <= min(values):
            return "The distance to real images is the lowest so far."
        return f"The distance to real images is {values[-1] / min(values):.2g} times its lowest."
    ratio = distance / floor
    words = "close to" if ratio < 1.5 else "near" if ratio < 4 else "far from"
    return f"Generated images are {words} real ones: {ratio:.2g} times the distance of real training images."


def _trend(lines: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [float(line[name]) for line in lines if line.get(name) is not None]


def _tiles(run: RunFiles) -> str:
    """Up to three headline numbers, each with its floor and its course over the run."""
    summary, cells = run.summary, []

    def tile(name: str, value: float | None, note: str, trend: list[float]) -> None:
        if value is None:
            value = trend[-1] if trend else None
        if value is not None:
            cells.append(
                f'<div class="tile"><span>{escape(name)}</span><b>{number(value)}</b>{sparkline(trend)}'
                f"<span>{escape(note)}</span></div>"
            )

    if run.measured:
        floor = summary.get("frechet_distance_floor")
        images = summary.get("evaluation_images") or run.measured[-1].get("evaluation_images") or 0
        tile(
            "Fréchet distance",
            summary.get("frechet_distance"),
            (f"real training images: {number(floor)}; " if floor else "validation; ") + f"{images:,} images",
            _trend(run.measured, "frechet_distance_validation"),
        )
        test = summary.get("class_accuracy_test")
        tile(
            "Class accuracy",
            summary.get("class_accuracy"),
            f"real test images: {number(test)}" if test else "",
            _trend(run.measured, "class_accuracy_validation"),
        )
        refit = _trend(run.measured, "divergence_refit")
        name = "divergence_refit" if refit else "divergence"
        tile(
            "Divergence, nats",
            None,
            "0 is indistinguishable, 0.69 is fully separable",
            refit or _trend(run.measured, name),
        )
    elif run.evaluated:
        errors = _trend(run.evaluated, "validation_error")
        tile("Weighted error, validation", None, "of the EMA denoiser", errors)
    if run.logged and len(cells) < 3:
        tile("Images per second", None, "", _trend(run.logged, "images_per_second"))
    return f'<div class="tiles">{"".join(cells)}</div>'


def _samples(run: RunFiles) -> str:
    """The newest sample grid, with a slider over the earlier ones."""
    if not run.grids:
        return ""
    pictures = "".join(picture(png, f"step {step:,}") for step, png in run.grids)
    last = len(run.grids) - 1
    return (
        f'<div class="samples"><h2>Samples</h2><div id="grids">{pictures}</div>'
        f'<p class="soft"><span id="shown">step {run.grids[-1][0]:,}</span>, the same latents at every step'
        "</p>"
        f'<input type="range" id="step" min="0" max="{last}" value="{last}" aria-label="step" hidden></div>'
    )


def evaluations(run: RunFiles) -> str:
    """The results of ``evaluate``, a table per protocol."""
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
    return section("Evaluation", charts(*parts))


def neighbors(run: RunFiles) -> str:
    """Generated images beside their nearest training images."""
    if run.neighbors is None:
        return ""
    return section(
        "Nearest training images",
        '<div class="neighbors"><p><b>generated</b> | nearest in the training set</p>'
        f"{picture(run.neighbors, 'samples and their nearest training images')}</div>",
        "Distances are in pixel space. A generator that memorizes shows copies here.",
    )
