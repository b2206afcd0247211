"""Reading pickles without running them.

A pickle is a program for a small stack machine; Python's own reader calls whatever the program names. This
one calls nothing: it carries out the instructions that build plain data, and where the program would call
something it notes the call down as a ``Record``. Names must be on an allow-list, so a pickle that wants
anything else is refused at once, by that name. What a record means is for its reader to decide.
"""

from __future__ import annotations

import io
import pickletools
import warnings
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True)
class Name:
    """A class or function that a pickle mentions; no more than its dotted name."""

    name: str


@dataclass(eq=False, repr=False)
class Record:
    """A call noted down: ``name`` of ``arguments``, and the state that the pickle gives to the result."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class Refused(ValueError):
    """The pickle asks for something that no snapshot needs; the message names it."""


PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSOR = "torch._utils._rebuild_tensor_v2"
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_DICTIONARIES = ("collections.OrderedDict", "dnnlib.util.EasyDict")
_AS_GIVEN = ("torch.Size", "builtins.set", "builtins.frozenset")  # stand for their argument
_RECONSTRUCTOR = "copyreg._reconstructor"
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # as protocols 0 to 2 spell them

ALLOWED = frozenset(
    [
        PERSISTENT, STORAGE, TENSOR, *PARAMETERS, *_DICTIONARIES, *_AS_GIVEN, _RECONSTRUCTOR,
        "builtins.object", "_codecs.encode", "torch.device",
        *(f"torch.nn.modules.container.{name}" for name in ("ModuleDict", "ModuleList", "Sequential")),
        *(f"torch.{name}" for name in ("float64", "float32", "float16", "bfloat16", "int64", "uint8")),
        "numpy.ndarray", "numpy.dtype",
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"numpy.{core}.numeric._frombuffer" for core in ("core", "_core")),
    ]
)  # fmt: skip


def read(data: BinaryIO) -> Any:
    """The content of a pickle: plain data, ``Name`` and ``Record``; the file must be seekable.

    A name outside ``ALLOWED`` is ``Refused``; every kind of damage is a ``ValueError``.
    """
    machine = _Machine()
    try:
        for opcode, argument, _ in pickletools.genops(_Bounded(data)):  # type: ignore[arg-type]
            machine.step(opcode.name, argument)
        return machine.pop()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError(f"damaged, or not a pickle ({ascii(str(error))[1:-1][:200]})") from None


class _Bounded:
    """A file whose ``read`` refuses to go past the end, before anything is allocated."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(start)
        self.readline, self.tell = file.readline, file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._end - self._file.tell():
            raise ValueError("it is cut short")
        return self._file.read(count)


class _Machine:
    """The stack machine: ``step`` carries out one instruction."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if self.marks and len(self.stack) <= self.marks[-1]:
            raise IndexError("stack underflow")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def step(self, opcode: str, argument: Any) -> None:
        match opcode:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "NONE":
                self.push(None)
            case "NEWTRUE" | "NEWFALSE":
                self.push(opcode == "NEWTRUE")
            case (
                "INT" | "BININT" | "BININT1" | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
                | "STRING" | "BINSTRING" | "SHORT_BINSTRING" | "UNICODE" | "BINUNICODE" | "SHORT_BINUNICODE"
                | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8"
            ):  # fmt: skip
                self.push(argument)
            case "MARK":
                self.marks.append(len(self.stack))
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                self.push(self.stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.push(self.memo[argument])
            case "EMPTY_TUPLE":
                self.push(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [self.pop() for _ in range(int(opcode[-1]))]
                self.push(tuple(reversed(items)))
            case "TUPLE":
                self.push(tuple(self.pop_to_mark()))
            case "EMPTY_LIST":
                self.push([])
            case "LIST":
                self.push(self.pop_to_mark())
            case "EMPTY_DICT":
                self.push({})
            case "DICT":
                self.push(_pairs(self.pop_to_mark()))
            case "EMPTY_SET":
                self.push(set())
            case "FROZENSET":
                self.push(frozenset(self.pop_to_mark()))
            case "APPEND":
                item = self.pop()
                _of_type(self.stack[-1], list).append(item)
            case "APPENDS":
                added = self.pop_to_mark()
                _of_type(self.stack[-1], list).extend(added)
            case "ADDITEMS":
                added = self.pop_to_mark()
                _of_type(self.stack[-1], set).update(added)
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _of_type(self.stack[-1], dict)[key] = value
            case "SETITEMS":
                added = self.pop_to_mark()
                _of_type(self.stack[-1], dict).update(_pairs(added))
            case "GLOBAL":
                self.push(_allowed(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                self.push(_allowed(_of_type(module, str), _of_type(attribute, str)))
            case "INST":
                function = _allowed(*argument.split(" ", 1))
                self.push(_call(function.name, tuple(self.pop_to_mark())))
            case "OBJ":
                function, *items = self.pop_to_mark()
                self.push(_call(_of_type(function, Name).name, tuple(items)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self.push(_call(_of_type(function, Name).name, _of_type(arguments, tuple)))
            case "BUILD":
                state = self.pop()
                _build(self.stack[-1], state)
            case _:
                raise Refused(f"refused: the pickle instruction {opcode}")


def _of_type(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        name = kind.__name__ if isinstance(kind, type) else kind[0].__name__
        raise TypeError(f"{_kind(value)} where a {name} is needed")
    return value


def _kind(value: Any) -> str:
    return value.name if isinstance(value, (Name, Record)) else type(value).__name__


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(items[::2], items[1::2], strict=True))


def _allowed(module: str, attribute: str) -> Name:
    name = f"{_OLD_MODULES.get(module, module)}.{attribute}"
    if name not in ALLOWED:
        raise Refused(f"refused: the pickle asks for {ascii(name)[1:-1][:200]}")
    return Name(name)


def _call(name: str, arguments: tuple[Any, ...]) -> Any:
    """The record of a call, or the plain data that it stands for."""
    if name in _DICTIONARIES and not arguments:
        return {}
    if name in _AS_GIVEN and len(arguments) == 1:
        return arguments[0]
    if name == "_codecs.encode":  # how protocols 0 to 2 spell bytes
        text, encoding = arguments
        if encoding != "latin1":
            raise ValueError("bytes are not encoded as latin1")
        return _of_type(text, str).encode("latin1")
    if name == _RECONSTRUCTOR:
        return _call(_of_type(arguments[0], Name).name, ())
    return Record(name, arguments)


def _build(target: Any, state: Any) -> None:
    if not isinstance(target, dict):  # attributes that a dictionary's class may have beside its items: none
        _of_type(target, Record).state = state


def tensor(value: Any) -> Tensor:
    """The tensor (on the CPU, contiguous) that a record rebuilds; anything else is a ``ValueError``.

    Its storage goes through ``torch.load(weights_only=True)``, must be as long as the shape needs, and is
    taken out of the record: no two tensors share one.
    """
    if isinstance(value, Record) and value.name in PARAMETERS and value.arguments:
        return tensor(value.arguments[0])
    if not isinstance(value, Record) or value.name != TENSOR or len(value.arguments) < 4:
        raise ValueError(f"{_kind(value)} where a tensor is needed")
    storage, offset, size, stride = value.arguments[:4]
    flat = _storage(storage)
    if not all(isinstance(v, tuple) and all(type(n) is int and n >= 0 for n in v) for v in (size, stride)):
        raise ValueError("a tensor's size and stride are no tuples of whole numbers")
    if len(size) != len(stride) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor's size, stride and offset do not agree")
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    if count and (last >= len(flat) or count > len(flat)):
        raise ValueError(f"a tensor of shape {list(size)} reaches beyond its storage of {len(flat)} numbers")
    return flat.as_strided(size, stride, offset).contiguous() if count else flat.new_empty(size)


def array(value: Any) -> npt.NDArray[Any]:
    """The array of floating-point numbers that a record rebuilds; anything else is a ``ValueError``."""
    if not isinstance(value, Record) or not value.name.startswith("numpy."):
        raise ValueError(f"{_kind(value)} where an array is needed")
    try:
        if value.name.endswith(
            "._reconstruct"
        ):  # ndarray.__reduce__: state is (version, shape, dtype, order, bytes)
            _, shape, dtype, fortran, content = value.state
        else:  # ndarray.__reduce_ex__(5): _frombuffer(bytes, dtype, shape, order)
            content, dtype, shape, order = value.arguments
            fortran = order == "F"
        kind = dtype.arguments[0]
        if value.name.endswith(".scalar") or kind not in ("f2", "f4", "f8") or dtype.state[1] not in "<=|":
            raise ValueError(f"numbers of kind {ascii(kind)[:20]}")
        flat = np.frombuffer(_of_type(content, (bytes, bytearray)), f"<{kind}")
        return flat.reshape(_of_type(shape, tuple), order="F" if fortran else "C")
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"an array is not stored as NumPy stores it ({error})") from None


def _storage(value: Any) -> Tensor:
    """All numbers of a storage's record, as a vector."""
    if not (isinstance(value, Record) and value.name == STORAGE and len(value.arguments) == 1):
        raise ValueError(f"{_kind(value)} where a tensor's storage is needed")
    payload = value.arguments[0]
    if not isinstance(payload, bytes):
        raise ValueError(f"a tensor's storage is {'used twice' if payload is None else 'not bytes'}")
    value.arguments = (None,)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of storages' deprecation
            storage = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise ValueError(f"a {type(storage).__name__} where a tensor's storage is needed")
            return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    except ValueError:
        raise
    except Exception as error:  # torch.load raises whatever its damaged or hostile input leads it to
        raise ValueError(f"refused: a tensor's storage ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """What torch.load has against its input, in one line: "Unsupported global: ..." where it says so."""
    text = " ".join(str(error).split())
    start = max(text.find("Unsupported"), text.find("WeightsUnpickler error:"), 0)
    return ascii(f"{type(error).__name__}: {text[start:]}"[:200])[1:-1]
