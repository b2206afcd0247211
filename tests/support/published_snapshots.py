"""Pickles of the published structure, made of the fixtures' networks, for the tests of ``convert``."""

from __future__ import annotations

import collections
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffratio_fast import convert, networks
from diffratio_fast.errors import UserError
from support import TESTS

FIXTURES = TESTS / "fixtures" / "backbones"
TINY = ["edm_ddpmpp_tiny", "edm_ncsnpp_tiny", "edm_adm_tiny", "edm2_tiny"]
PUBLISHED_NAMES = {"EDMDenoiser": "EDMPrecond", "EDM2Denoiser": "Precond", "MPUNet": "UNet"}


SOURCE = "raise SystemError('the source was executed')"


class Published:
    """Stands for an object of the published code; pickled as its persistence mechanism does."""

    def __init__(self, class_name: str, state: Any) -> None:
        self.meta = {
            "type": "class", "version": 6, "module_src": SOURCE, "class_name": class_name, "state": state
        }  # fmt: skip

    def __reduce__(self) -> Any:
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


class Call:
    """Pickled as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.reduced = (function, arguments)

    def __reduce__(self) -> Any:
        return self.reduced


class EasyDict(dict):  # type: ignore[type-arg]
    pass


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> Any:
    """Execute the source in the pickle, as the published code does."""
    module = types.ModuleType("published")
    exec(meta["module_src"], module.__dict__)
    return module


@pytest.fixture
def code(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules that the published pickles refer to, as if their code were installed."""
    EasyDict.__module__ = "dnnlib.util"
    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    for name, members in {
        "dnnlib": {}, "dnnlib.util": {"EasyDict": EasyDict}, "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
    }.items():  # fmt: skip
        module = types.ModuleType(name)
        module.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, module)


def published(module: torch.nn.Module, arguments: dict[str, Any] | None = None, **more: Any) -> Any:
    """A module of this package, pickled as the published code does."""
    children = {name: published(child) for name, child in module._modules.items() if child is not None}
    if isinstance(module, torch.nn.ModuleDict):
        container = torch.nn.ModuleDict()
        container._modules.update(children)
        return container
    state = {
        "training": False,
        "_parameters": collections.OrderedDict(module._parameters),
        "_buffers": collections.OrderedDict(module._buffers) | {"scratch": torch.zeros(3)},
        "_non_persistent_buffers_set": {"scratch"},
        "_backward_hooks": collections.OrderedDict(),
        "_modules": collections.OrderedDict(children),
        "_init_args": (),
        "_init_kwargs": EasyDict(arguments or {}),
        **more,
    }
    name = type(module).__name__
    return Published(PUBLISHED_NAMES.get(name, name), state)


def snapshot(name: str, **more: Any) -> dict[str, Any]:
    """The dictionary that a published run pickles, with a fixture's network."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        about = file.metadata()
    network, _ = networks.load_published(FIXTURES / f"{name}.safetensors")
    vae = {"_init_kwargs": EasyDict(vae_name="vae"), "scale": np.float32([4.17, 4.62]), "_vae": None,
           "bias": np.float32(1.5), "shape": torch.Size([1, 2]), "device": torch.device("cpu")}  # fmt: skip
    return EasyDict(
        ema=published(network, json.loads(about["config"]), **more),
        encoder=Published("StabilityVAEEncoder", vae),
        dataset_kwargs=EasyDict(
            class_name="training.dataset.ImageFolderDataset", resolution=16, use_labels=True
        ),
        loss_fn=Published("EDMLoss", {"P_mean": -1.2, "P_std": 1.2}),
    )


def write(path: Path, content: Any, protocol: int | None = None) -> Path:
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def fails(path: Path, *options: str) -> str:
    """The one-line error of a conversion that fails; nothing is written."""
    out = path.with_name("out.safetensors")
    with pytest.raises(UserError) as caught:
        convert.main([str(path), str(out), *options])
    assert not list(path.parent.glob("out*"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text
