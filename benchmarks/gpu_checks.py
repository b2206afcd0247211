"""tests/gpu: the same checks that pytest runs on a GPU, without pytest."""

from __future__ import annotations

import importlib.util
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "gpu"


def run(name: str) -> None:
    """Run the checks of ``tests/gpu/<name>_checks.py``, if there are any; raises at the first that fails."""
    path = FOLDER / f"{name}_checks.py"
    if not path.exists():
        return
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    print(f"{name}: {module.run_all()} CUDA checks passed", flush=True)
