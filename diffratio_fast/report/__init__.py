"""report.html: one page about a run, usable offline, written from the files of the run directory."""

from diffratio_fast.report.page import write

__all__ = ["write"]
