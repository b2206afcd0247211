"""Hooks of the documentation site: pages that are generated from the package."""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from typing import Any

COMMANDS = (
    "train", "pretrain", "sample", "evaluate", "refit", "average", "prepare", "convert", "export", "report",
)  # fmt: skip


def help_text(command: str) -> str:
    """What ``python -m diffratio_fast.COMMAND --help`` prints."""
    name = "report.__main__" if command == "report" else command
    module = importlib.import_module(f"diffratio_fast.{name}")
    captured = io.StringIO()
    os.environ["COLUMNS"] = "100"
    with contextlib.redirect_stdout(captured), contextlib.suppress(SystemExit):
        module.main(["--help"])
    return captured.getvalue()


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Fill in the pages of the commands and of the API."""
    source = page.file.src_uri
    if source == "commands.md":
        parts = [f"## {name}\n\n```text\n{help_text(name)}```\n" for name in COMMANDS]
        return "\n".join([markdown, *parts])
    if source == "api.md":
        return re.sub(r"^- `(diffratio_fast\.[\w.]+)`$", r"::: \1\n", markdown, flags=re.M)
    return re.sub(
        r"\[([^\]]*)\]\(\.\./[\w./-]+\)", r"\1", markdown
    )  # files outside docs/ are not on the site
