"""The PEP 517 backend: setuptools, but building against the PyTorch of the environment that runs pip.

pip builds in an isolated environment that does not see it. An extension must match the torch it will be
loaded beside, so that one is looked for (``probe.find_torch``); where there is none, the build asks for one.
"""

from __future__ import annotations

from typing import Any

import probe
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  (the hooks not wrapped below)


def _requirements(found: list[str]) -> list[str]:
    torch = probe.find_torch()
    if torch is not None and not torch.too_old:
        print(f"diffratio_fast: building against torch {torch.version} in {torch.path}", flush=True)
        return found
    if torch is not None:
        print(f"diffratio_fast: torch {torch.version} in {torch.path} is too old", flush=True)
    return [*found, f"torch>={probe.MINIMUM}"]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_wheel(config_settings))


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    return _requirements(build_meta.get_requires_for_build_editable(config_settings))
