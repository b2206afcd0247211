"""docs/api.md lists the public API: every name exists and is documented, and nothing public is missing."""

import importlib
import inspect
import re
from types import ModuleType
from typing import Any

import pytest
from support import ROOT

NAMES = re.findall(r"^- `(diffratio_fast[\w.]*)`", (ROOT / "docs/api.md").read_text(), re.M)
PACKAGES = ("diffratio_fast", "diffratio_fast.ops", "diffratio_fast.networks")


def resolve(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", NAMES)
def test_listed_names_exist_and_are_documented(name: str) -> None:
    found = resolve(name)
    if not (inspect.isclass(found) or inspect.isfunction(found)):
        return
    doc = inspect.getdoc(found)
    assert doc, f"{name} has no docstring"
    assert len(doc.splitlines()[0]) <= 110, doc
    if inspect.isfunction(found):
        hints = inspect.get_annotations(found)
        assert set(inspect.signature(found).parameters) | {"return"} <= set(hints), (
            f"{name} is not fully typed"
        )


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_are_listed(package: str) -> None:
    module = importlib.import_module(package)
    public = {
        f"{package}.{name}" for name in module.__all__ if not isinstance(getattr(module, name), ModuleType)
    }
    assert public <= set(NAMES), sorted(public - set(NAMES))
