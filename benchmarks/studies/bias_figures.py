"""Tables and pictures of ``benchmarks.studies.bias_study``."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.studies.figures import Figures

Row = dict[str, Any]
COLORS = {
    "DiffRatio": "#c23b22",
    "DiffRatio, before": "#e0a396",
    "VSD, learned teacher": "#1f5fa8",
    "VSD, exact teacher": "#5a9e6f",
}
METHODS = tuple(COLORS)
SETTING_COLORS = {
    "DiffRatio, before": "#e0a396",
    "DiffRatio": "#c23b22",
    "DiffRatio, matched pairs": "#7a1f10",
    "score distillation": "#1f5fa8",
}


def rounded(value: Any) -> Any:
    """Round numbers to five digits, so that a committed file stays small."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(len(values))


def one_line(row: Row) -> str:
    mean, error = spread(row["sliced_wasserstein"][-1])
    where = row.get("setting", f"{row['dimensions']} dimensions")
    if row.get("held_out"):
        where += f" ({row['online']:g}, {row['generator']:g}, {row['weight']})"
    return f"{where}, {row['recipe']}: sliced Wasserstein {mean:.4f} +- {error:.4f} ({row['seconds']:.0f} s)"


def tables(found: dict[str, Any]) -> str:
    """Format the existing parts as Markdown."""
    parts = []
    if "settings" in found:
        parts += [_setting_table(found["settings"]), _choice_table(found["settings"])]
    if "scores" in found:
        parts += [_score_table(found["scores"]), _weight_table(found["weights"])]
        parts += [_divergence_table(found["scores"]), _few_table(found["scores"])]
    if "training" in found:
        parts.append(_training_table(found["training"]))
    if "knobs" in found:
        parts.append(_knob_table(found["knobs"]))
    if "switches" in found:
        parts.append(_training_table(found["switches"]))
    return "\n\n".join(parts)


def _pick(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def _head(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _cell(row: Row) -> str:
    error, bias2 = math.sqrt(row["error2"]), row["bias2"]
    bias = math.copysign(math.sqrt(abs(bias2)), bias2)
    return f"{row['cosine']:.2f}; {error:.2f} ± {row['error2_se'] / (2 * error):.2f} (bias {bias:.2f})"


def _score_table(rows: list[Row]) -> str:
    lines = _head("dimensions", "pair", "σ", *METHODS)
    chosen = _pick(rows, divergence="reverse_kl", setting="base")
    for dimensions, pair, sigma in dict.fromkeys((r["dimensions"], r["pair"], r["sigma"]) for r in chosen):
        group = _pick(chosen, dimensions=dimensions, pair=pair, sigma=sigma)
        cells = [_cell(_pick(group, method=method)[0]) for method in METHODS]
        lines.append(f"| {dimensions} | {pair} | {sigma:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _setting_table(rows: list[Row]) -> str:
    rows = _pick(rows, held_out=False)
    lines = _head("data and networks", *SETTING_COLORS)
    for setting in dict.fromkeys(row["setting"] for row in rows):
        cells = []
        for row in _pick(rows, setting=setting):
            mean, error = spread(row["sliced_wasserstein"][-1])
            cells.append(f"{mean:.4f} ± {error:.4f}")
        lines.append(f"| {setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _choice_table(rows: list[Row]) -> str:
    lines = _head("method", "online rate", "generator rate", "weight")
    for method in SETTING_COLORS:
        for row in _pick(rows, recipe=method, held_out=False)[:1]:
            lines.append(f"| {method} | {row['online']:g} | {row['generator']:g} | {row['weight']} |")
    return "\n".join(lines)


def _weight_table(rows: list[Row]) -> str:
    """Relative error of the whole gradient and its bias, by weight."""
    weights = list(dict.fromkeys(row["weight"] for row in rows))
    lines = [
        f"| dimensions | pair | method | {' | '.join(weights)} |",
        "|---|---|---|" + "---|" * len(weights),
    ]
    for key in dict.fromkeys((r["dimensions"], r["pair"], r["method"]) for r in rows):
        group = _pick(rows, dimensions=key[0], pair=key[1], method=key[2])
        cells = []
        for weight in weights:
            row = _pick(group, weight=weight)[0]
            cells.append(f"{math.sqrt(row['error2']):.2f} ({math.sqrt(max(row['bias2'], 0.0)):.2f})")
        lines.append(f"| {key[0]} | {key[1]} | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _divergence_table(rows: list[Row]) -> str:
    chosen = [r for r in rows if r["method"] == "DiffRatio" and r["setting"] == "base"]
    names = list(dict.fromkeys(row["divergence"] for row in chosen))
    lines = _head("dimensions", "pair", "σ", *names)
    for key in dict.fromkeys((r["dimensions"], r["pair"], r["sigma"]) for r in chosen):
        if key[2] not in (0.1, 0.4, 1.6):
            continue
        group = _pick(chosen, dimensions=key[0], pair=key[1], sigma=key[2])
        errors = (math.sqrt(_pick(group, divergence=name)[0]["error2"]) for name in names)
        cells = [
            "over 100" if error > 100 else f"{error:.2f}" for error in errors
        ]  # the reference is almost zero
        lines.append(f"| {key[0]} | {key[1]} | {key[2]:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _few_table(rows: list[Row]) -> str:
    chosen = [
        r
        for r in rows
        if (r["dimensions"], r["pair"], r["divergence"]) == (16, "near", "reverse_kl")
        and (r["setting"] != "base" or r["method"] != "VSD, exact teacher")
    ]
    kinds = list(dict.fromkeys((r["method"], r["setting"]) for r in chosen))
    sigmas = list(dict.fromkeys(row["sigma"] for row in chosen))
    lines = [
        f"| method | data | {' | '.join(f'σ = {s:g}' for s in sigmas)} |",
        "|---|---|" + "---|" * len(sigmas),
    ]
    for method, setting in kinds:
        group = _pick(chosen, method=method, setting=setting)
        cells = [f"{math.sqrt(_pick(group, sigma=s)[0]['error2']):.2f}" for s in sigmas]
        lines.append(f"| {method} | {'its law' if setting == 'base' else setting} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _training_table(rows: list[Row]) -> str:
    lines = _head("dimensions", "recipe", "at the start", "at a fifth", "at the end", "KL(data, generator)")
    for row in rows:
        cells = []
        for place in (0, len(row["steps"]) // 5, -1):
            mean, error = spread(row["sliced_wasserstein"][place])
            cells.append(f"{mean:.4f} ± {error:.4f}")
        kl = ""
        if "kl_data_generator" in row:
            mean, error = spread(row["kl_data_generator"][-1])
            kl = f"{mean:.3f} ± {error:.3f}"
        lines.append(f"| {row['dimensions']} | {row['recipe']} | {' | '.join(cells)} | {kl} |")
    return "\n".join(lines)


def _knob_table(rows: list[Row]) -> str:
    lines = _head("setting", "at a fifth", "at the end")
    for row in rows:
        cells = []
        for place in (len(row["steps"]) // 5, -1):
            mean, error = spread(row["sliced_wasserstein"][place])
            cells.append(f"{mean:.4f} ± {error:.4f}")
        lines.append(f"| {row['recipe']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(found: dict[str, Any], figures: Figures) -> None:
    """Draw the figures of the existing parts as PNG."""
    pyplot = figures.pyplot
    pyplot.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    for name, picture in (
        ("settings", _draw_settings),
        ("scores", _draw_scores),
        ("training", _draw_training),
        ("knobs", _draw_knobs),
    ):
        if name in found:
            figures.save(picture(pyplot, found[name]), f"bias_study_{name}", bbox_inches="tight")


def _draw_settings(pyplot: Any, rows: list[Row]) -> Any:
    """Distances at the end, relative to score distillation, one line per setting."""
    rows = _pick(rows, held_out=False)
    names = list(dict.fromkeys(row["setting"] for row in rows))
    figure, axis = pyplot.subplots(figsize=(6.5, 0.33 * len(names) + 1))
    for offset, (method, color) in enumerate(SETTING_COLORS.items()):
        means, bars = [], []
        for name in names:
            base, _ = spread(
                _pick(rows, setting=name, recipe="score distillation")[0]["sliced_wasserstein"][-1]
            )
            mean, error = spread(_pick(rows, setting=name, recipe=method)[0]["sliced_wasserstein"][-1])
            means.append(mean / base)
            bars.append(error / base)
        places = [len(names) - place + 0.24 - 0.16 * offset for place in range(len(names))]
        axis.errorbar(means, places, xerr=bars, fmt="o", markersize=4, color=color, label=method, capsize=2)
    axis.axvline(1.0, color="#bbbbbb", linewidth=0.7)
    axis.set_yticks([len(names) - place for place in range(len(names))], names)
    axis.set(xscale="log", xlabel="distance to the data at the end, relative to score distillation")
    axis.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    figure.tight_layout()
    return figure


def _draw_scores(pyplot: Any, rows: list[Row]) -> Any:
    """Relative error and its bias against the noise level."""
    rows = _pick(rows, divergence="reverse_kl", setting="base")
    dimensions = list(dict.fromkeys(row["dimensions"] for row in rows))
    pairs = list(dict.fromkeys(row["pair"] for row in rows))
    figure, axes = pyplot.subplots(
        len(pairs), len(dimensions), figsize=(9, 5), sharex=True, sharey=True, squeeze=False
    )
    for line, pair in zip(axes, pairs, strict=True):
        for axis, size in zip(line, dimensions, strict=True):
            for method in METHODS:
                group = _pick(rows, dimensions=size, pair=pair, method=method)
                sigma = [row["sigma"] for row in group]
                error = [math.sqrt(row["error2"]) for row in group]
                bar = [row["error2_se"] / (2 * e) for row, e in zip(group, error, strict=True)]
                axis.errorbar(sigma, error, bar, color=COLORS[method], label=method, marker=".", capsize=2)
                bias = [math.sqrt(max(row["bias2"], 0.0)) for row in group]
                axis.plot(sigma, bias, "--", color=COLORS[method], linewidth=0.9)
            axis.set(xscale="log", yscale="log", ylim=(0.02, 8), title=f"{size} dimensions, {pair}")
            axis.axhline(1.0, color="#bbbbbb", linewidth=0.7)
    for axis in axes[-1]:
        axis.set_xlabel("σ")
    for line in axes:
        line[0].set_ylabel("relative error (dashed: bias)")
    axes[0][0].legend(frameon=False)
    figure.tight_layout()
    return figure


def _draw_training(pyplot: Any, rows: list[Row]) -> Any:
    dimensions = list(dict.fromkeys(row["dimensions"] for row in rows))
    panels = [(size, "sliced_wasserstein", "sliced Wasserstein distance") for size in dimensions]
    panels.insert(1, (2, "kl_data_generator", "KL(data, generator), nats"))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(12, 3.2))
    names = list(dict.fromkeys(row["recipe"] for row in rows))
    colors = {name: f"C{number}" for number, name in enumerate(names)}
    for axis, (size, key, label) in zip(axes, panels, strict=True):
        for row in rows:
            if row["dimensions"] == size and key in row:
                means, bars = zip(*(spread(values) for values in row[key]), strict=True)
                axis.errorbar(
                    row["steps"], means, bars, color=colors[row["recipe"]], linewidth=1, capsize=1,
                    label=row["recipe"],
                )  # fmt: skip
        axis.set(yscale="log", xlabel="generator steps", title=f"{size} dimensions", ylabel=label)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], 4e-3))  # the exact method converges to zero
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=5, frameon=False, bbox_to_anchor=(0.5, -0.12))
    figure.tight_layout()
    return figure


def _draw_knobs(pyplot: Any, rows: list[Row]) -> Any:
    figure, axis = pyplot.subplots(figsize=(6, 4))
    found = [spread(row["sliced_wasserstein"][-1]) for row in rows]
    places = range(len(rows), 0, -1)
    axis.barh(
        places, [mean for mean, _ in found], xerr=[error for _, error in found], color="#c9d6e6", capsize=2
    )
    axis.axvline(found[0][0], color="#c23b22", linewidth=0.8)
    axis.set_yticks(list(places), [row["recipe"] for row in rows])
    axis.set_xlabel("sliced Wasserstein distance at the end, 16 dimensions")
    figure.tight_layout()
    return figure
