"""Line and bar charts as inline SVG: no script, no fonts, colors from the style sheet of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 300
LEFT, RIGHT, TOP, BOTTOM = 58, 12, 10, 40
MAX_POINTS = 400
"""Maximum points drawn per series; longer series are subsampled."""
MARKED = 40
"""Series of at most this many points have dots with values as tooltips."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Series:
    """Named points in order of x; ``style`` is a class of the page's style sheet (s0, s1, ... or ideal)."""

    name: str
    points: Sequence[Point]
    style: str


@dataclass(frozen=True)
class Axis:
    """An axis: its label and scale; the range is that of the data unless given."""

    label: str
    log: bool = False
    low: float | None = None
    high: float | None = None


def line_chart(title: str, series: Sequence[Series], x: Axis, y: Axis, note: str = "") -> str:
    """Draw polylines; points that are not finite (or not positive on a log axis) are skipped."""
    shown = []
    for line in series:
        points = [p for p in line.points if _drawable(p[0], x) and _drawable(p[1], y)]
        stride = -(-len(points) // MAX_POINTS) if points else 1
        last = points[-1:] if (len(points) - 1) % stride else []
        if points:
            shown.append(Series(line.name, [*points[::stride], *last], line.style))
    if not shown:
        return ""
    horizontal = _Scale(x, [p[0] for line in shown for p in line.points], LEFT, WIDTH - RIGHT)
    vertical = _Scale(y, [p[1] for line in shown for p in line.points], HEIGHT - BOTTOM, TOP)
    parts = [_axes(horizontal, vertical)]
    for line in shown:
        places = [(horizontal(a), vertical(b)) for a, b in line.points]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        parts.append(f'<polyline class="line {line.style}" points="{path}"/>')
        if len(places) <= MARKED and line.style != "ideal":
            for (a, b), (value_x, value_y) in zip(places, line.points, strict=True):
                tooltip = escape(f"{line.name}: {number(value_y)} at {number(value_x)}")
                parts.append(
                    f'<circle class="dot {line.style}" cx="{a:.1f}" cy="{b:.1f}" r="3">'
                    f"<title>{tooltip}</title></circle>"
                )
    return _figure(title, parts, shown, note)


def bar_chart(title: str, edges: Sequence[float], series: Sequence[Series], x: Axis, y: Axis) -> str:
    """Draw histograms over shared ``edges`` [n + 1]; the points of a series are its heights [n]."""
    heights = [value for line in series for _, value in line.points]
    if not heights:
        return ""
    horizontal = _Scale(x, edges, LEFT, WIDTH - RIGHT, margin=0.0)
    vertical = _Scale(Axis(y.label, low=0.0), heights, HEIGHT - BOTTOM, TOP)
    parts = [_axes(horizontal, vertical)]
    for line in series:
        outline = [(horizontal(edges[0]), vertical(0.0))]
        for i, (_, value) in enumerate(line.points):
            outline += [(horizontal(edges[i]), vertical(value)), (horizontal(edges[i + 1]), vertical(value))]
        outline.append((horizontal(edges[-1]), vertical(0.0)))
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in outline)
        parts.append(f'<polygon class="area {line.style}" points="{path}"/>')
    return _figure(title, parts, series, "")


def sparkline(values: Sequence[float]) -> str:
    """Draw the course of a number without axes; nothing for fewer than two finite values."""
    values = [value for value in values if math.isfinite(value)]
    if len(values) < 2:
        return ""
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    points = " ".join(
        f"{100 * i / (len(values) - 1):.1f},{22 - 20 * (value - low) / span:.1f}"
        for i, value in enumerate(values)
    )
    return (
        '<svg class="spark" viewBox="0 0 100 24" preserveAspectRatio="none" role="img" '
        f'aria-label="from {number(values[0])} to {number(values[-1])}">'
        f'<polyline class="line s0" points="{points}"/></svg>'
    )


def number(value: float) -> str:
    """Format a number with few characters."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) >= 1e5 or abs(value) < 1e-3:
        return f"{value:.2g}".replace("e-0", "e-").replace("e+0", "e").replace("e+", "e")
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _drawable(value: float | None, axis: Axis) -> bool:
    return value is not None and math.isfinite(value) and (value > 0 or not axis.log)


class _Scale:
    """Map of one axis from data to pixels, and its ticks."""

    def __init__(
        self, axis: Axis, values: Sequence[float], start: float, end: float, margin: float = 0.04
    ) -> None:
        self.axis, self.start, self.end = axis, start, end
        low = min(values) if axis.low is None else axis.low
        high = max(values) if axis.high is None else axis.high
        low, high = self._place(low), self._place(high)
        if high - low < 1e-12 * max(abs(high), 1.0):
            pad = 0.5 if axis.log else max(abs(high) * 0.1, 0.5)
            low, high = low - pad, high + pad
        room = (high - low) * margin
        self.low = low if axis.low is not None else low - room
        self.high = high if axis.high is not None else high + room

    def _place(self, value: float) -> float:
        return math.log10(value) if self.axis.log else value

    def __call__(self, value: float) -> float:
        share = (self._place(value) - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.axis.log:
            decades = range(math.floor(self.low), math.ceil(self.high) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5)):
                found = [m * 10.0**d for d in decades for m in steps]
                found = [v for v in found if self.low - 1e-9 <= math.log10(v) <= self.high + 1e-9]
                if len(found) >= 3:
                    return found[:: max(1, -(-len(found) // 8))]
            return _even(10.0**self.low, 10.0**self.high)  # less than a decade
        return _even(self.low, self.high)


def _even(low: float, high: float) -> list[float]:
    """About five round numbers at equal distances."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    return [i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _axes(horizontal: _Scale, vertical: _Scale) -> str:
    parts = []
    for value in vertical.ticks():
        y = vertical(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>'
        )
    bottom = HEIGHT - BOTTOM
    for value in horizontal.ticks():
        x = horizontal(value)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{number(value)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text class="label" x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(horizontal.axis.label)}"
        "</text>"
    )
    height = (TOP + bottom) / 2
    parts.append(
        f'<text class="label" x="13" y="{height}" text-anchor="middle" '
        f'transform="rotate(-90 13 {height})">{escape(vertical.axis.label)}</text>'
    )
    return "".join(parts)


def _figure(title: str, parts: Sequence[str], series: Sequence[Series], note: str) -> str:
    keys = "".join(
        f'<span class="key"><i class="{line.style}"></i>{escape(line.name)}</span>' for line in series
    )
    legend = f'<div class="legend">{keys}</div>' if len(series) > 1 else ""
    below = f'<p class="note">{escape(note)}</p>' if note else ""
    return (
        f"<figure><figcaption>{escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f"{legend}{below}</figure>"
    )
