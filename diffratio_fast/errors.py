"""Exceptions of the package."""

from __future__ import annotations


class UserError(Exception):
    """Bad input of any kind: the message is one line that says what is wrong and what to do."""


class ReportedElsewhere(UserError):
    """Another process of the same run tells of the error; this one ends without a word."""
