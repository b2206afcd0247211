"""Building blocks of the page: sections, rows of charts, series over the steps, pictures."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape
from typing import Any

from diffratio_fast.report.charts import Axis, Series

STEP = Axis("step")
SIGMA = Axis("noise level σ", log=True)


def section(title: str, content: str, text: str = "") -> str:
    """Return a titled section, or nothing without content."""
    if not content:
        return ""
    return f"<section><h2>{escape(title)}</h2>{_paragraph(text)}{content}</section>"


def details(title: str, content: str, text: str = "") -> str:
    """Return a titled section that opens on a click, or nothing without content."""
    if not content:
        return ""
    return f"<details><summary><h2>{escape(title)}</h2></summary>{_paragraph(text)}{content}</details>"


def _paragraph(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>' if text else ""


def charts(*parts: str) -> str:
    """Return the charts that are not empty, side by side where the page is wide enough."""
    content = "".join(parts)
    return f'<div class="charts">{content}</div>' if content else ""


def over_time(lines: Sequence[dict[str, Any]], name: str, label: str, style: str) -> Series:
    """Return the values ``name`` of the log lines that have it, over the step."""
    return Series(label, [(line["step"], line[name]) for line in lines if name in line], style)


def picture(png: bytes, text: str) -> str:
    """Return a PNG as an image with the alternative text ``text``."""
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def level_style(i: int, count: int) -> str:
    """Return the style of noise level ``i`` of ``count`` on the sequential palette q0 (small σ) to q7."""
    return f"q{round(7 * i / max(count - 1, 1))}"
