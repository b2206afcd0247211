"""Exceptions of the package."""

from __future__ import annotations


class UserError(Exception):
    """Bad input: the message is one line with what is wrong, what was expected and what to do."""


class Interrupted(Exception):
    """A signal ended a command after it saved its work; ``number`` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ReportedElsewhere(UserError):
    """Another process of the same run reports the error; this process exits silently."""
