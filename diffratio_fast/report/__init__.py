"""report.html: a run on one page that opens offline, made from the files of its directory alone."""

from diffratio_fast.report.page import write

__all__ = ["write"]
