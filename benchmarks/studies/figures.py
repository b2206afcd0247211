"""Output of the studies' figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffratio_fast.errors import UserError
from diffratio_fast.storage.writing import make_directory


class Figures:
    """A folder for PNG files; opened before a study begins, so that errors appear early."""

    def __init__(self, folder: Path) -> None:
        try:
            import matplotlib

            matplotlib.use("Agg")
            from matplotlib import pyplot
        except ImportError:
            raise UserError("--images: matplotlib is not installed; pip install matplotlib") from None
        make_directory(folder)
        self.folder = folder
        self.pyplot: Any = pyplot

    def save(self, figure: Any, name: str, **options: Any) -> None:
        figure.savefig(self.folder / f"{name}.png", dpi=90, **options)
        self.pyplot.close(figure)
