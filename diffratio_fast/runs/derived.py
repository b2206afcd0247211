"""Derived output: files of a run that are not needed to continue. Their errors never stop training."""

from __future__ import annotations

from collections.abc import Callable

from diffratio_fast.errors import UserError
from diffratio_fast.storage.reading import one_line


class Derived:
    """Writes derived output; after a failure, prints one warning until a write succeeds again."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._failing: set[str] = set()

    def attempt(self, what: str, write: Callable[[], object]) -> bool:
        """Return whether ``write`` succeeded; a file system error becomes a warning that names ``what``."""
        try:
            write()
        except (OSError, UserError) as error:
            if what not in self._failing:
                self._failing.add(what)
                reason = getattr(error, "strerror", None) or one_line(error).rpartition(": ")[2]
                self._say(f"warning: {what} cannot be written now ({reason}); training goes on")
            return False
        if what in self._failing:
            self._failing.remove(what)
            self._say(f"{what}: written again")
        return True
