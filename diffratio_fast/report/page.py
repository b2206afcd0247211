"""The page: its sections in order; a section without data is empty."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import Any

from diffratio_fast.errors import UserError
from diffratio_fast.report import curves, details, overview
from diffratio_fast.report.run_files import RunFiles, read
from diffratio_fast.report.style import SCRIPT, STYLE
from diffratio_fast.runs.paths import RunPaths
from diffratio_fast.storage.reading import DAMAGE, one_line
from diffratio_fast.storage.writing import replace_file

SECTIONS: tuple[Callable[[RunFiles], str], ...] = (
    overview.overview,
    curves.quality,
    curves.divergence,
    curves.training,
    overview.neighbors,
    overview.evaluations,
    details.by_sigma,
    details.calibration,
    details.noise_levels,
    details.cost,
    details.configuration,
)
"""The sections of a report, in order: a new chart is a function here or a chart in one of these."""

_SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    f"script-src 'sha256-{_SCRIPT_DIGEST}'; base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy: the browser blocks every network request and every script but the page's own."""


def write(root: Path, summary: dict[str, Any] | None = None) -> Path:
    """Write ``root``/report.html from the other files of the run and return its path.

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


def page(run: RunFiles, *, refresh: int | None = None) -> str:
    """The report as HTML; with ``refresh`` the browser loads it again after so many seconds."""
    title = f"{run.config.get('preset', 'run')}: {run.root.resolve().name}"
    return document(title, [section(run) for section in SECTIONS], refresh=refresh)


def document(title: str, sections: list[str], *, refresh: int | None = None) -> str:
    """A page of its own with the report's style and script."""
    again = f'<meta http-equiv="refresh" content="{refresh}">\n' if refresh else ""
    content = "\n".join(section for section in sections if section)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n{again}'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<h1>{escape(title)}</h1>\n"
        f"{content}\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )
