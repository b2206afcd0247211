"""Published snapshots to safetensors: pickles of the published structure, hostile ones, damaged ones."""

from __future__ import annotations

import collections
import contextlib
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import one_error_line, run
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from diffratio_fast import convert, networks, safe_pickle, snapshots
from diffratio_fast.command import UserError

FIXTURES = Path(__file__).parent / "fixtures" / "backbones"
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
    """What the published code does: the source in the pickle is executed."""
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
    """A module of ours as the published code would pickle it."""
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
    """The dictionary that a published run pickles, around a fixture's network."""
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
    """The one line with which conversion fails; nothing is written."""
    out = path.with_name("out.safetensors")
    with pytest.raises(UserError) as caught:
        convert.main([str(path), str(out), *options])
    assert not list(path.parent.glob("out*"))
    text = str(caught.value)
    assert "\n" not in text and len(text) < 700
    return text


# What it is for.


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", TINY)
@torch.no_grad()
def test_a_snapshot_becomes_the_network(
    name: str, protocol: int, code: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path / "network.pkl", snapshot(name), protocol)
    for module in [key for key in sys.modules if key.startswith(("torch_utils", "dnnlib"))]:
        monkeypatch.delitem(sys.modules, module)  # the code is not there any more
    out = tmp_path / "deep" / "network.safetensors"
    assert convert.main([str(path), str(out)]) == 0
    assert not [key for key in sys.modules if key.startswith(("torch_utils", "dnnlib"))]
    fixture = load_file(FIXTURES / f"{name}.safetensors")
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        about = file.metadata()
    written = load_file(out)
    assert set(written) == {key.removeprefix("state.") for key in fixture if key.startswith("state.")}
    assert all(torch.equal(value, fixture[f"state.{key}"]) for key, value in written.items())
    network, metadata = networks.load_published(out)
    assert metadata["architecture"] == about["architecture"].replace("edm2:a", "edm2:other")
    assert json.loads(metadata["config"]) == json.loads(about["config"])
    by_hand = networks.from_published(metadata["architecture"], metadata["config"]).eval()
    by_hand.load_state_dict(written, strict=True)
    for result in (network, by_hand):
        denoised = result(fixture["input.x"], fixture["input.sigma"], fixture.get("input.labels"))
        assert (denoised - fixture["output.denoised"]).abs().max() < 3e-6 * fixture[
            "output.denoised"
        ].abs().max()


@pytest.mark.usefixtures("code")
def test_half_precision_weights_stay_as_they_are(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    network, _ = networks.load_published(FIXTURES / "edm2_tiny.safetensors")
    content["ema"] = published(network.half(), network.config)
    out = tmp_path / "out.safetensors"
    convert.main([str(write(tmp_path / "n.pkl", content)), str(out)])
    written = load_file(out)
    assert written["unet.out_conv.weight"].dtype == torch.float16
    assert next(networks.load_published(out)[0].parameters()).dtype == torch.float32


@pytest.mark.usefixtures("code")
def test_views_of_storages_and_positional_arguments(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    state = content["ema"].meta["state"]
    config = state["_init_kwargs"]
    state["_init_args"] = tuple(config.pop(key) for key in ("img_resolution", "img_channels", "label_dim"))
    network, _ = networks.load_published(FIXTURES / "edm2_tiny.safetensors")
    freqs = network.logvar_fourier.freqs
    wide = torch.stack([torch.full_like(freqs, 9.0), freqs])
    state["_modules"]["logvar_fourier"].meta["state"]["_buffers"]["freqs"] = wide.T[
        :, 1
    ]  # strided, with offset
    out = tmp_path / "out.safetensors"
    convert.main([str(write(tmp_path / "n.pkl", content)), str(out)])
    assert torch.equal(load_file(out)["logvar_fourier.freqs"], freqs)
    loaded, _ = networks.load_published(out)
    assert (loaded.img_resolution, loaded.img_channels, loaded.label_dim) == (16, 4, 10)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("name", "dropped", "architecture", "added"),
    [
        ("edm_ddpmpp_tiny", ["embedding_type", "encoder_type", "decoder_type", "channel_mult_noise",
                             "resample_filter"], "edm:ddpmpp", {}),
        ("edm_adm_tiny", ["model_type", "label_dim"], "edm:adm", {"model_type": "DhariwalUNet"}),
        ("edm_ncsnpp_tiny", ["decoder_type"], "edm:ncsnpp", {"decoder_type": "standard"}),
    ],
)  # fmt: skip
def test_options_left_to_the_published_defaults(
    name: str, dropped: list[str], architecture: str, added: dict[str, Any]
) -> None:
    content = snapshot(name)
    kwargs = content["ema"].meta["state"]["_init_kwargs"]
    for option in dropped:
        del kwargs[option]
    kwargs["sigma_max"] = float("inf")
    record = safe_pickle.read(io.BytesIO(pickle.dumps(content)))["ema"]
    network = snapshots.published_network(record)
    assert network.architecture == architecture
    assert "sigma_max" not in network.config
    assert added.items() <= network.config.items()
    built = networks.from_published(network.architecture, network.config)
    if "label_dim" not in dropped:
        built.load_state_dict(network.state, strict=True)


@pytest.mark.usefixtures("code")
def test_info_prints_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "n.pkl", snapshot("edm2_tiny"))
    assert convert.main([str(path), "--info"]) == 0
    said = capsys.readouterr().out
    assert "ema: Precond" in said and "encoder: StabilityVAEEncoder" in said and "loss_fn: EDMLoss" in said
    assert "edm2:other" in said and '"model_channels": 16' in said
    tensors = sum(key.startswith("state.") for key in load_file(FIXTURES / "edm2_tiny.safetensors"))
    assert f"{tensors} tensors of float32" in said
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.usefixtures("code")
def test_another_key(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    content["net"] = content.pop("ema")
    path = write(tmp_path / "n.pkl", content)
    assert "has no 'ema'; it holds 'encoder', 'dataset_kwargs', 'loss_fn', 'net'" in fails(path)
    assert convert.main([str(path), str(tmp_path / "o.safetensors"), "--key", "net"]) == 0
    assert "is of class StabilityVAEEncoder; known: EDMPrecond (EDM), Precond (EDM2)" in fails(
        path, "--key", "encoder"
    )
    assert "is of class dict" in fails(path, "--key", "dataset_kwargs")


# Hostile pickles: nothing runs.


def evil(marker: Path) -> Call:
    return Call(os.system, f"touch {marker}")


def raw(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


def stack_global(module: str, name: str) -> bytes:
    return b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)) + b"\x93"


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def _legacy(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _zipped(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_network(place: str, value: Any) -> bytes:
    """A snapshot with ``value`` in a buffer, among the arguments, or beside the network."""
    content = snapshot("edm2_tiny")
    state = content["ema"].meta["state"]
    if place == "buffer":
        state["_modules"]["logvar_fourier"].meta["state"]["_buffers"]["freqs"] = value
    elif place == "arguments":
        state["_init_kwargs"]["dropout"] = value
    else:
        content[place] = value
    return pickle.dumps(content)


def storage_call(payload: bytes) -> Call:
    rebuilt = Call(torch.storage._load_from_bytes, payload)
    return Call(torch._utils._rebuild_tensor_v2, rebuilt, 0, (1,), (1,), False, collections.OrderedDict())


HOSTILE: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "os.system": (lambda m: pickle.dumps(evil(m)), "refused: the pickle asks for posix.system"),
    "protocol 0": (lambda m: pickle.dumps(evil(m), 0), "refused: the pickle asks for posix.system"),
    "instance": (lambda m: b"(S'touch " + str(m).encode() + b"'\nios\nsystem\n.", "asks for os.system"),
    "object": (lambda m: b"(cos\nsystem\nS'touch " + str(m).encode() + b"'\no.", "asks for os.system"),
    "eval": (lambda m: pickle.dumps(Call(eval, f"open({str(m)!r}, 'w')")), "asks for builtins.eval"),
    "exec": (lambda m: pickle.dumps({"ema": Call(exec, f"open({str(m)!r}, 'w')")}), "asks for builtins.exec"),
    "python 2's name": (lambda m: b"c__builtin__\neval\n(S'1'\ntR.", "asks for builtins.eval"),
    "process": (
        lambda m: pickle.dumps(Call(subprocess.Popen, ["touch", str(m)])), "asks for subprocess.Popen"
    ),
    "in the network": (lambda m: in_network("buffer", evil(m)), "asks for posix.system"),
    "in the arguments": (lambda m: in_network("arguments", evil(m)), "asks for posix.system"),
    "beside the network": (lambda m: in_network("training_set", evil(m)), "asks for posix.system"),
    "nested": (
        lambda m: pickle.dumps(Call(collections.OrderedDict, Call(tuple, [evil(m)]))),
        "asks for builtins.tuple",
    ),
    "getattr": (
        lambda m: pickle.dumps(Call(getattr, torch.storage._load_from_bytes, "__globals__")),
        "asks for builtins.getattr",
    ),
    "a dotted name": (
        lambda m: raw(stack_global("torch.storage", "_load_from_bytes.__globals__")),
        "asks for torch.storage._load_from_bytes.__globals__",
    ),
    "a dotted module": (
        lambda m: raw(stack_global("torch.serialization.os", "system"), text("touch x"), b"\x85R"),
        "asks for torch.serialization.os.system",
    ),
    "a lying split": (lambda m: raw(stack_global("torch", "hub.load")), "asks for torch.hub.load"),
    "torch.load": (lambda m: pickle.dumps(Call(torch.load, "x")), "asks for torch.serialization.load"),
    "numpy.load": (lambda m: pickle.dumps(Call(np.load, str(m))), "asks for numpy.load"),
    "a name with escapes": (lambda m: b"cos\n\x1b[2Jx\n.", "asks for os.\\x1b[2Jx"),
    "a registered extension": (lambda m: raw(b"\x82\x01"), "refused: the pickle instruction EXT1"),
    "a persistent id": (lambda m: b"Pid\n.", "refused: the pickle instruction PERSID"),
    "an out-of-band buffer": (lambda m: b"\x80\x05\x97.", "refused: the pickle instruction NEXT_BUFFER"),
    "state for a function": (
        lambda m: raw(stack_global("torch.storage", "_load_from_bytes"), b"}", text("__code__"), b"K\x01sb"),
        "torch.storage._load_from_bytes where a Record is needed",
    ),
    "a call of data": (lambda m: raw(text("eval"), b")R"), "str where a Name is needed"),
    "a module's text as function": (
        lambda m: raw(stack_global("dnnlib.util", "EasyDict"), b")R", b")R"), "dict where a Name is needed"
    ),
}  # fmt: skip


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_refused_by_name(case: str, tmp_path: Path) -> None:
    make, message = HOSTILE[case]
    marker = tmp_path / "marker"
    path = tmp_path / "n.pkl"
    path.write_bytes(make(marker))
    said = fails(path)
    assert message in said and said.startswith(f"{path}: ")
    assert not marker.exists()


@pytest.mark.usefixtures("code")
def test_the_source_in_a_published_pickle_is_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", f"open({str(marker)!r}, 'w')")
    path = write(tmp_path / "n.pkl", snapshot("edm2_tiny"))
    pickle.loads(path.read_bytes())
    assert marker.exists()  # Python's own reader does
    marker.unlink()
    assert convert.main([str(path), str(tmp_path / "o.safetensors")]) == 0
    assert not marker.exists()


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    "wrap", [pickle.dumps, _legacy, _zipped, lambda value: _legacy([torch.ones(1), value])]
)
def test_a_hostile_storage_is_refused(wrap: Callable[[Any], bytes], tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    payload = wrap(evil(marker))
    with contextlib.suppress(Exception):  # whatever it ends with, it has run by then
        torch.load(io.BytesIO(payload), weights_only=False)
    marker.unlink()  # raises if it had not
    path = tmp_path / "n.pkl"
    path.write_bytes(in_network("buffer", storage_call(payload)))
    said = fails(path)
    assert "refused: a tensor's storage" in said
    assert not marker.exists()


def _storage(numbers: int) -> Call:
    return Call(torch.storage._load_from_bytes, _legacy(torch.zeros(numbers).storage()))


def _view(storage: Any, offset: Any, size: Any, stride: Any) -> Call:
    return Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, None)


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: _view(_storage(4), 0, (5,), (1,)), "reaches beyond its storage of 4 numbers"),
        (lambda: _view(_storage(4), 3, (2,), (1,)), "reaches beyond its storage"),
        (lambda: _view(_storage(4), 0, (2**45,), (0,)), "reaches beyond its storage"),
        (lambda: _view(_storage(4), 0, (2, 2), (1,)), "do not agree"),
        (lambda: _view(_storage(4), -1, (1,), (1,)), "do not agree"),
        (lambda: _view(_storage(4), 0, (-1,), (1,)), "no tuples of whole numbers"),
        (lambda: _view(_storage(4), 0, (True,), (1,)), "no tuples of whole numbers"),
        (lambda: _view(_storage(4), 0, (1,) * 100, (1,) * 100), "freqs"),
        (lambda: _view(torch.Size([1]), 0, (1,), (1,)), "tuple where a tensor's storage is needed"),
        (lambda: storage_call(_legacy(torch.ones(3))), "a Tensor where a tensor's storage is needed"),
        (lambda: storage_call(b""), "refused: a tensor's storage (EOFError"),
        (lambda: storage_call(_legacy(torch.zeros(4).storage())[:-3]), "refused: a tensor's storage"),
        (lambda: Call(torch.storage._load_from_bytes, "text"), "where a tensor is needed"),
        (lambda: 7, "int where a tensor is needed"),
        (lambda: Published("Tensor", {}), "where a tensor is needed"),
    ],
)
def test_tensors_that_are_none(value: Callable[[], Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "n.pkl"
    path.write_bytes(in_network("buffer", value()))
    assert message in fails(path)


@pytest.mark.usefixtures("code")
def test_one_storage_for_two_tensors_is_refused(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    fourier = content["ema"].meta["state"]["_modules"]["logvar_fourier"].meta["state"]["_buffers"]
    shared = _storage(128)
    fourier["freqs"], fourier["phases"] = _view(shared, 0, (128,), (1,)), _view(shared, 0, (128,), (1,))
    assert "used twice" in fails(write(tmp_path / "n.pkl", content))


@pytest.mark.usefixtures("code")
def test_modules_in_circles_and_in_crowds_are_refused(tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    modules = content["ema"].meta["state"]["_modules"]
    modules["again"] = modules["unet"]
    assert "modules occur twice" in fails(write(tmp_path / "n.pkl", content))
    circle = torch.nn.ModuleDict()
    circle._modules["self"] = circle
    modules["again"] = circle
    assert "modules occur twice" in fails(write(tmp_path / "n.pkl", content))
    chain: Any = torch.nn.ModuleDict()
    for _ in range(40):
        outer = torch.nn.ModuleDict()
        outer._modules["inner"] = chain
        chain = outer
    modules["again"] = chain
    assert "more than 16 deep" in fails(write(tmp_path / "n.pkl", content))


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["state"]["_init_kwargs"].update(depth=3), "unknown option 'depth'"),
        (
            lambda m: m["state"]["_init_kwargs"].update(channel_mult=[1, 2, 2]),
            "weights do not fit edm2:other",
        ),
        (lambda m: m["state"]["_init_kwargs"].update(dropout=Published("x", {})), "are not plain data"),
        (lambda m: m["state"]["_init_kwargs"].update(dropout=float("nan")), "are not plain data"),
        (lambda m: m["state"].update(_init_args=(16, 4, 10, True, 0.5, 128, 9)), "7 positional arguments"),
        (lambda m: m["state"].update(_init_args=3), "not a tuple and a dictionary"),
        (lambda m: m["state"].update(_modules=[1]), "_modules is a list"),
        (lambda m: m["state"]["_modules"].pop("unet"), "weights do not fit edm2:other: Missing key"),
        (lambda m: m["state"]["_modules"].update(unet=3), "int where an object of the published code"),
        (lambda m: m.update(state=None), "the state of Precond is not a dictionary"),
        (lambda m: m.update(class_name="VPPrecond"), "is of class VPPrecond; known:"),
        (
            lambda m: m.update(class_name="EDMPrecond"),
            "its U-Net is of class NoneType; known: SongUNet",
        ),
        (lambda m: m.pop("class_name"), "is of class None; known:"),
    ],
)
def test_networks_that_are_none(change: Callable[[Any], Any], message: str, tmp_path: Path) -> None:
    content = snapshot("edm2_tiny")
    change(content["ema"].meta)
    assert message in fails(write(tmp_path / "n.pkl", content))


# Damaged files.


@pytest.mark.usefixtures("code")
def test_a_snapshot_cut_short_anywhere(tmp_path: Path) -> None:
    whole = pickle.dumps(snapshot("edm2_tiny"))
    path = tmp_path / "n.pkl"
    for length in [1, 2, 5, 100, 1000, *range(3000, len(whole), len(whole) // 40), len(whole) - 1]:
        path.write_bytes(whole[:length])
        assert "damaged, or not a pickle" in fails(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "damaged, or not a pickle"),
        (b"\x00" * 1000, "damaged, or not a pickle"),
        (b"hello\n" * 10, "damaged, or not a pickle"),
        (raw(b"\x8e" + struct.pack("<Q", 2**62)), "it is cut short"),
        (raw(b"\x8e" + struct.pack("<Q", 2**35)), "it is cut short"),
        (raw(b"\x8b" + struct.pack("<i", 2**31 - 1)), "it is cut short"),
        (raw(b"N", b"r" + struct.pack("<I", 2**32 - 1)), "holds a NoneType, not a snapshot's dictionary"),
        (raw(b"0" * 3), "damaged, or not a pickle (pop from empty list"),
        (raw(b"(0"), "damaged, or not a pickle (stack underflow"),
        (raw(b"]" + b"]a" * 3), "holds a list, not a snapshot's dictionary"),
        (raw(b"}]Ns"), "damaged, or not a pickle"),  # an unhashable key
        (raw(b"}(Nu"), "damaged, or not a pickle"),  # a key without value
        (raw(b"h\x07"), "damaged, or not a pickle"),
        (raw(b"}"), "not a snapshot's dictionary"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged, or not a pickle"),
        (_zipped({"ema": torch.ones(1)}), "a zip archive, as torch.save writes them"),
        (pickle.dumps({"ema": torch.nn.Linear(2, 2)}), "asks for torch.nn.modules.linear.Linear"),
        (pickle.dumps({"ema": 3}), "is of class int; known:"),
    ],
)  # fmt: skip
def test_files_that_are_no_snapshots(data: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "n.pkl"
    path.write_bytes(data)
    assert message in fails(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert "No such file" in fails(tmp_path / "n.pkl")
    (tmp_path / "n.pkl").mkdir()
    assert "Is a directory" in fails(tmp_path / "n.pkl")
    with pytest.raises(UserError, match="say where to write"):
        convert.main([str(tmp_path / "n.pkl")])
    with pytest.raises(UserError, match="would overwrite the snapshot itself"):
        convert.main([str(tmp_path / "n.pkl"), str(tmp_path / "x" / ".." / "n.pkl")])


def test_the_command(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write(tmp_path / "bad.pkl", {"ema": evil(marker)})
    failed = run("convert", "bad.pkl", "out.safetensors", cwd=tmp_path)
    assert "posix.system" in one_error_line(failed)
    assert sorted(os.listdir(tmp_path)) == ["bad.pkl"]


# The reader against Python's own.

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
        | st.frozensets(st.integers() | st.text())
    ),
    max_leaves=12,
)


@given(plain, st.integers(4, 5), st.booleans())
def test_plain_data_is_read_as_python_reads_it(value: Any, protocol: int, twice: bool) -> None:
    value = [value, value] if twice else value  # shared, through the memo
    data = pickle.dumps(value, protocol)
    assert repr(safe_pickle.read(io.BytesIO(data))) == repr(pickle.loads(data))


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_value_or_a_value_error(data: bytes) -> None:
    try:
        safe_pickle.read(io.BytesIO(b"\x80\x04" + data))
    except ValueError as error:
        assert str(error)


def test_sharing_and_cycles_survive() -> None:
    inner = [1]
    value: list[Any] = [inner, inner]
    value.append(value)
    read = safe_pickle.read(io.BytesIO(pickle.dumps(value)))
    assert read[0] is read[1] and read[2] is read
