"""Hostile or damaged published snapshots: no code runs, and one line reports the error."""

from __future__ import annotations

import collections
import contextlib
import io
import os
import pickle
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import published_snapshots
from support.helpers import in_child, one_error_line, run
from support.published_snapshots import (
    Call,
    Published,
    code,  # noqa: F401 - a fixture
    fails,
    snapshot,
    write,
)

from diffratio_fast import convert
from diffratio_fast.errors import UserError
from diffratio_fast.storage import pickles

# Hostile pickles: no code runs.


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
    """A snapshot with ``value`` in a buffer, among the arguments, or next to the network."""
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
    printed = fails(path)
    assert message in printed and printed.startswith(f"{path}: ")
    assert not marker.exists()


def doubled(times: int) -> bytes:
    """Instructions that build a tuple of two of a tuple of two ...: 2^times items in a few bytes."""
    return b")" + b"2\x86" * times  # DUP, TUPLE2


MANY = 64 << 20
SWELLING: dict[str, tuple[bytes, str]] = {
    "a key of nested tuples": (raw(b"}", doubled(60), b"K\x01s"), "a tuple as a key"),
    "keys of nested tuples": (raw(b"}(", doubled(60), b"K\x01u"), "a tuple as a key"),
    "a set of nested tuples": (raw(b"\x8f(", doubled(60), b"\x90"), "a tuple as a key"),
    "a frozen set of nested tuples": (raw(b"(", doubled(60), b"\x91"), "a tuple as a key"),
    "a key without end": (raw(b"}", text("k" * MANY), b"K\x01s"), "a key of more than 1000 characters"),
    "a number as a key": (raw(b"}\x8b", struct.pack("<I", MANY), b"\x01" * MANY, b"K\x01s"), "a key of more"),
    "a name without end": (raw(text("k" * MANY), text("x"), b"\x93"), "refused: the pickle asks for kkk"),
    "a line without end": (b"I" + b"7" * MANY + b"\n.", "a line of more than"),
    "a text encoded over and over": (
        raw(
            stack_global("_codecs", "encode"), b"\x94", text("k" * 500_000), text("latin1"), b"\x86\x94",
            b"h\x00h\x01R" * 100_000,
        ),
        "more bytes than the file has",
    ),
    "instructions without end": (raw(b"}0" * 1500), "more than 2000 instructions"),
}  # fmt: skip


@pytest.mark.parametrize("case", SWELLING)
def test_a_pickle_that_swells_is_refused(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content, message = SWELLING[case]
    if "2000" in message:
        monkeypatch.setattr(pickles, "OPERATIONS", 2000)
    path = tmp_path / "n.pkl"
    path.write_bytes(content)
    assert message in in_child(lambda: convert.main([str(path), str(tmp_path / "o.safetensors")]))


@pytest.mark.usefixtures("code")
def test_arguments_that_swell_are_refused(tmp_path: Path) -> None:
    shared: Any = ()
    for _ in range(40):
        shared = (shared, shared)
    path = tmp_path / "n.pkl"
    path.write_bytes(in_network("arguments", shared))
    assert "the arguments of Precond are not plain data" in fails(path)


@pytest.mark.usefixtures("code")
def test_the_source_in_a_published_pickle_is_never_executed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "marker"
    monkeypatch.setattr(published_snapshots, "SOURCE", f"open({str(marker)!r}, 'w')")
    path = write(tmp_path / "n.pkl", snapshot("edm2_tiny"))
    pickle.loads(path.read_bytes())
    assert marker.exists()  # Python's pickle module runs it
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
    with contextlib.suppress(Exception):  # it has run even if an error follows
        torch.load(io.BytesIO(payload), weights_only=False)
    marker.unlink()  # raises if it has not run
    path = tmp_path / "n.pkl"
    path.write_bytes(in_network("buffer", storage_call(payload)))
    printed = fails(path)
    assert "refused: a tensor's storage" in printed
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
        (lambda: _view(_storage(4), 0, (-1,), (1,)), "not tuples of integers"),
        (lambda: _view(_storage(4), 0, (True,), (1,)), "not tuples of integers"),
        (lambda: _view(_storage(4), 0, (1,) * 100, (1,) * 100), "freqs"),
        (lambda: _view(torch.Size([1]), 0, (1,), (1,)), "tuple where a tensor's storage is needed"),
        (lambda: storage_call(_legacy(torch.ones(3))), "a Tensor where a tensor's storage is needed"),
        (lambda: storage_call(b""), "refused: a tensor's storage (damaged, or not a pickle"),
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
    assert "a module occurs twice" in fails(write(tmp_path / "n.pkl", content))
    circle = torch.nn.ModuleDict()
    circle._modules["self"] = circle
    modules["again"] = circle
    assert "a module occurs twice" in fails(write(tmp_path / "n.pkl", content))
    chain: Any = torch.nn.ModuleDict()
    for _ in range(40):
        outer = torch.nn.ModuleDict()
        outer._modules["inner"] = chain
        chain = outer
    modules["again"] = chain
    assert "nested deeper than 16" in fails(write(tmp_path / "n.pkl", content))


@pytest.mark.usefixtures("code")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["state"]["_init_kwargs"].update(depth=3), "unknown option 'depth'"),
        (
            lambda m: m["state"]["_init_kwargs"].update(channel_mult=[1, 2, 2]),
            "weights do not match edm2:other",
        ),
        (lambda m: m["state"]["_init_kwargs"].update(dropout=Published("x", {})), "are not plain data"),
        (lambda m: m["state"]["_init_kwargs"].update(dropout=float("nan")), "are not plain data"),
        (lambda m: m["state"].update(_init_args=(16, 4, 10, True, 0.5, 128, 9)), "7 positional arguments"),
        (lambda m: m["state"].update(_init_args=3), "not a tuple and a dictionary"),
        (lambda m: m["state"].update(_modules=[1]), "_modules is a list"),
        (lambda m: m["state"]["_modules"].pop("unet"), "weights do not match edm2:other: Missing key"),
        (lambda m: m["state"]["_modules"].update(unet=3), "int; expected an object of the published code"),
        (lambda m: m.update(state=None), "the state of Precond is not a dictionary"),
        (lambda m: m.update(class_name="VPPrecond"), "has class VPPrecond; expected"),
        (
            lambda m: m.update(class_name="EDMPrecond"),
            "its U-Net has class NoneType; expected SongUNet",
        ),
        (lambda m: m.pop("class_name"), "has class None; expected"),
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
        (raw(b"N", b"r" + struct.pack("<I", 2**32 - 1)), "contains a NoneType; expected the dictionary"),
        (raw(b"0" * 3), "damaged, or not a pickle (pop from empty list"),
        (raw(b"(0"), "damaged, or not a pickle (stack underflow"),
        (raw(b"]" + b"]a" * 3), "contains a list; expected the dictionary of a snapshot"),
        (raw(b"}]Ns"), "damaged, or not a pickle"),  # an unhashable key
        (raw(b"}(Nu"), "damaged, or not a pickle"),  # a key without value
        (raw(b"h\x07"), "damaged, or not a pickle"),
        (raw(b"}"), "expected the dictionary of a snapshot"),
        (b"I" + b"9" * 5000 + b"\n.", "damaged, or not a pickle"),
        (_zipped({"ema": torch.ones(1)}), "a zip archive written by torch.save"),
        (pickle.dumps({"ema": torch.nn.Linear(2, 2)}), "asks for torch.nn.modules.linear.Linear"),
        (pickle.dumps({"ema": 3}), "has class int; expected"),
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
    with pytest.raises(UserError, match="no output file"):
        convert.main([str(tmp_path / "n.pkl")])
    with pytest.raises(UserError, match="would overwrite the snapshot"):
        convert.main([str(tmp_path / "n.pkl"), str(tmp_path / "x" / ".." / "n.pkl")])


@pytest.mark.slow
def test_the_command(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    write(tmp_path / "bad.pkl", {"ema": evil(marker)})
    failed = run("convert", "bad.pkl", "out.safetensors", cwd=tmp_path)
    assert "posix.system" in one_error_line(failed)
    assert sorted(os.listdir(tmp_path)) == ["bad.pkl"]
