"""Reading pickles without running code.

A pickle is a program for a small stack machine. Python's reader calls any function that the program names.
This reader calls nothing: it executes the instructions that build plain data and stores each call as a
``Record``. Names must be on an allow-list; any other name raises ``Refused``. The caller interprets records.
"""

from __future__ import annotations

import io
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffratio_fast.storage.reading import DAMAGE


@dataclass(frozen=True)
class Name:
    """The dotted name of a class or function in a pickle."""

    name: str


@dataclass(eq=False, repr=False)
class Record:
    """A recorded call ``name(*arguments)``, and the state that the pickle sets on the result."""

    name: str
    arguments: tuple[Any, ...]
    state: Any = None


class Refused(ValueError):
    """The pickle contains a name that is not allowed; the message has the name."""


PERSISTENT = "torch_utils.persistence._reconstruct_persistent_obj"
STORAGE = "torch.storage._load_from_bytes"
TENSOR = "torch._utils._rebuild_tensor_v2"
PERSISTENT_ID = "persistent id"
"""Name of the record of a persistent id, which is not a class or function."""
PARAMETERS = ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
_DICTIONARIES = ("collections.OrderedDict", "dnnlib.util.EasyDict")
_AS_GIVEN = ("torch.Size", "builtins.set", "builtins.frozenset")  # replaced by their argument
_RECONSTRUCTOR = "copyreg._reconstructor"
_OLD_MODULES = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # names in protocols 0 to 2

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


OPERATIONS = 4_000_000
"""Maximum instructions of a pickle."""
LINE_LIMIT = 1 << 24
"""Maximum bytes of a line of protocol 0."""
KEY_LIMIT = 1000
"""Maximum characters, bytes or bits of a dictionary key or a set member."""
PLAIN_LIMIT = 100_000
"""Maximum items of plain data that ``plain`` copies."""


def read(data: BinaryIO, *, any_name: bool = False) -> Any:
    """The content of a pickle: plain data, ``Name`` and ``Record``; the file must be seekable.

    A name outside ``ALLOWED`` raises ``Refused``, unless ``any_name`` is set; this also allows the persistent
    ids of ``torch.save``. A damaged pickle raises ``ValueError``. Time and memory are proportional to the
    file size: keys are short and plain, instructions are counted, and no instruction copies data.
    """
    bounded = _Bounded(data)
    machine = _Machine(any_name, bounded.size)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(bounded)):  # type: ignore[arg-type]
            if number == OPERATIONS:
                raise ValueError(f"more than {OPERATIONS} instructions")
            machine.step(opcode.name, argument)
        return machine.pop()
    except Refused:
        raise
    except (ValueError, IndexError, KeyError, TypeError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"damaged, or not a pickle ({_shown(str(error), 200)})") from None


def plain(value: Any) -> Any:
    """Copy plain data without shared parts; raise ``ValueError`` if it is too large or not plain.

    With shared parts, a pickle of a hundred bytes can describe nested lists with 2^30 items.
    """
    left = PLAIN_LIMIT

    def copy(item: Any, depth: int) -> Any:
        nonlocal left
        left -= 1
        if left < 0 or depth > 50:
            raise ValueError("plain data of too many items, or nested too deeply")
        if isinstance(item, (list, tuple)):
            return [copy(part, depth + 1) for part in item]
        if isinstance(item, dict):
            return {key: copy(part, depth + 1) for key, part in item.items()}
        if item is None or isinstance(item, (bool, int, float, str)):
            return item
        raise ValueError(f"a {_kind(item)} where plain data is needed")

    return copy(value, 0)


def _shown(text: str, limit: int) -> str:
    """The beginning of a text, without terminal control characters."""
    return ascii(text[:limit])[1:-1][:limit]


class _Bounded:
    """A file whose ``read`` raises before allocating memory if it would go past the end."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        start = file.tell()
        self._end = file.seek(0, io.SEEK_END)
        file.seek(start)
        self.size = self._end - start
        self.tell = file.tell

    def read(self, count: int) -> bytes:
        if not 0 <= count <= self._end - self._file.tell():
            raise ValueError("it is cut short")
        return self._file.read(count)

    def readline(self) -> bytes:
        line = self._file.readline(LINE_LIMIT + 1)
        if len(line) > LINE_LIMIT:
            raise ValueError(f"a line of more than {LINE_LIMIT} bytes")
        return line


class _Machine:
    """The stack machine; ``step`` executes one instruction."""

    def __init__(self, any_name: bool = False, encoded: int = 0) -> None:
        self.any_name = any_name
        self.encoded = encoded  # remaining bytes that encode calls may produce
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
                self.push(frozenset(map(_key, self.pop_to_mark())))
            case "APPEND":
                item = self.pop()
                _of_type(self.stack[-1], list).append(item)
            case "APPENDS":
                added = self.pop_to_mark()
                _of_type(self.stack[-1], list).extend(added)
            case "ADDITEMS":
                added = self.pop_to_mark()
                _of_type(self.stack[-1], set).update(map(_key, added))
            case "SETITEM":
                value, key = self.pop(), self.pop()
                _of_type(self.stack[-1], dict)[_key(key)] = value
            case "SETITEMS":
                added = self.pop_to_mark()
                _of_type(self.stack[-1], dict).update(_pairs(added))
            case "GLOBAL":
                self.push(self.allowed(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                attribute, module = self.pop(), self.pop()
                self.push(self.allowed(_of_type(module, str), _of_type(attribute, str)))
            case "INST":
                function = self.allowed(*argument.split(" ", 1))
                self.push(self.call(function.name, tuple(self.pop_to_mark())))
            case "OBJ":
                function, *items = self.pop_to_mark()
                self.push(self.call(_of_type(function, Name).name, tuple(items)))
            case "REDUCE" | "NEWOBJ":
                arguments, function = self.pop(), self.pop()
                self.push(self.call(_of_type(function, Name).name, _of_type(arguments, tuple)))
            case "BUILD":
                state = self.pop()
                _build(self.stack[-1], state)
            case "BINPERSID" if self.any_name:
                self.push(Record(PERSISTENT_ID, (self.pop(),)))
            case _:
                raise Refused(f"refused: the pickle instruction {opcode}")

    def allowed(self, module: str, attribute: str) -> Name:
        name = f"{_OLD_MODULES.get(module, module)}.{attribute}"
        if name not in ALLOWED and not self.any_name:
            raise Refused(f"refused: the pickle asks for {_shown(name, 200)}")
        return Name(name)

    def call(self, name: str, arguments: tuple[Any, ...]) -> Any:
        """Return the record of a call, or the plain data that it represents."""
        if name in _DICTIONARIES and not arguments:
            return {}
        if name in _AS_GIVEN and len(arguments) == 1:
            return arguments[0]
        if name == "_codecs.encode":  # bytes in protocols 0 to 2
            text, encoding = arguments
            if encoding != "latin1":
                raise ValueError("bytes are not encoded as latin1")
            self.encoded -= len(_of_type(text, str))
            if self.encoded < 0:  # the same text is encoded many times
                raise ValueError("more bytes than the file has")
            return text.encode("latin1")
        if name == _RECONSTRUCTOR:
            return self.call(_of_type(arguments[0], Name).name, ())
        return Record(name, arguments)


def _of_type(value: Any, kind: type | tuple[type, ...]) -> Any:
    if not isinstance(value, kind):
        name = kind.__name__ if isinstance(kind, type) else kind[0].__name__
        raise TypeError(f"{_kind(value)} where a {name} is needed")
    return value


def _kind(value: Any) -> str:
    return value.name if isinstance(value, (Name, Record)) else type(value).__name__


def _pairs(items: list[Any]) -> dict[Any, Any]:
    return dict(zip(map(_key, items[::2]), items[1::2], strict=True))


def _key(value: Any) -> Any:
    """Check that a key is short and not nested: hashing shared nested tuples takes exponential time."""
    if isinstance(value, (str, bytes)):
        long = len(value) > KEY_LIMIT
    elif isinstance(value, int):
        long = value.bit_length() > KEY_LIMIT
    else:
        raise TypeError(f"a {_kind(value)} as a key, where strings, integers and bytes are read")
    if long:
        raise ValueError(f"a key of more than {KEY_LIMIT} characters")
    return value


def _build(target: Any, state: Any) -> None:
    if not isinstance(target, dict):  # state of a dictionary is ignored
        _of_type(target, Record).state = state


def tensor(value: Any) -> Tensor:
    """The tensor (CPU, contiguous) that a record describes; ``ValueError`` for anything else.

    ``torch.load(weights_only=True)`` reads its storage, which must have the length that the shape needs. The
    storage is removed from the record, so two tensors never share it.
    """
    if isinstance(value, Record) and value.name in PARAMETERS and value.arguments:
        return tensor(value.arguments[0])
    if not isinstance(value, Record) or value.name != TENSOR or len(value.arguments) < 4:
        raise ValueError(f"{_kind(value)} where a tensor is needed")
    storage, offset, size, stride = value.arguments[:4]
    flat = _storage(storage)
    if not all(isinstance(v, tuple) and all(type(n) is int and n >= 0 for n in v) for v in (size, stride)):
        raise ValueError("a tensor's size and stride are not tuples of integers")
    if len(size) != len(stride) or type(offset) is not int or offset < 0:
        raise ValueError("a tensor's size, stride and offset do not agree")
    count, last = 1, offset
    for length, step in zip(size, stride, strict=True):
        count *= length
        last += (length - 1) * step
    if count and (last >= len(flat) or count > len(flat)):
        raise ValueError(f"a tensor of shape {list(size)} reaches beyond its storage of {len(flat)} numbers")
    return flat.as_strided(size, stride, offset).contiguous() if count else flat.new_empty(size)


def array(value: Any, kinds: tuple[str, ...] = ("f2", "f4", "f8")) -> npt.NDArray[Any]:
    """The array of ``kinds`` (NumPy type codes) that a record describes; ``ValueError`` for anything else."""
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
        if value.name.endswith(".scalar") or kind not in kinds or dtype.state[1] not in "<=|":
            raise ValueError(f"numbers of kind {_shown(str(kind), 20)}")
        if isinstance(content, str):  # bytes of Python 2
            content = content.encode("latin1")
        flat = np.frombuffer(_of_type(content, (bytes, bytearray)), f"<{kind}")
        return flat.reshape(_of_type(shape, tuple), order="F" if fortran else "C")
    except (TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"an array is not stored as NumPy stores it ({error})") from None


def _storage(value: Any) -> Tensor:
    """All numbers of the storage in a record, as a vector."""
    if not (isinstance(value, Record) and value.name == STORAGE and len(value.arguments) == 1):
        raise ValueError(f"{_kind(value)} where a tensor's storage is needed")
    payload = value.arguments[0]
    if not isinstance(payload, bytes):
        raise ValueError(f"a tensor's storage is {'used twice' if payload is None else 'not bytes'}")
    value.arguments = (None,)
    try:
        check_torch_file(io.BytesIO(payload))
    except ValueError as error:
        raise ValueError(f"refused: a tensor's storage ({_shown(str(error), 200)})") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecation warnings of storages
            storage = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
            if not isinstance(storage, torch.storage.TypedStorage):
                raise ValueError(f"a {type(storage).__name__} where a tensor's storage is needed")
            return torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    except ValueError:
        raise
    except Exception as error:  # torch.load can raise any error on damaged or malicious input
        raise ValueError(f"refused: a tensor's storage ({_reason(error)})") from None


def _reason(error: Exception) -> str:
    """The reason for an error of torch.load in one line, such as "Unsupported global: ..."."""
    text = " ".join(str(error)[:10_000].split())
    start = max(text.find("Unsupported"), text.find("WeightsUnpickler error:"), 0)
    return _shown(f"{type(error).__name__}: {text[start:]}", 200)


_LEGACY_PICKLES = 5
"""Pickles in a legacy file: magic number, protocol, system, content, storage keys."""


def check_torch_file(file: BinaryIO) -> None:
    """Check that ``torch.load(weights_only=True)`` needs time and memory proportional to the file size.

    ``torch.load`` decompresses an archive without limit, allocates the declared size of a legacy file, and
    hashes nested tuples. Raises ``ValueError`` for such a file. ``torch.load`` reports all other errors.
    """
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    packed = file.read(2) == b"PK"
    file.seek(0)
    try:
        for content in _pickles_of_archive(file, size) if packed else _legacy_pickles(file):
            _check_storages(content, size)
    except (RuntimeError, *DAMAGE) as error:  # zipfile raises RuntimeError for an encrypted file
        raise ValueError(_shown(str(error), 200)) from None
    file.seek(0)


def _legacy_pickles(file: BinaryIO) -> Iterator[Any]:
    return (read(file, any_name=True) for _ in range(_LEGACY_PICKLES))


def _pickles_of_archive(file: BinaryIO, size: int) -> Iterator[Any]:
    with zipfile.ZipFile(file) as archive:
        if sum(info.file_size for info in archive.infolist()) > size:
            raise ValueError("a compressed archive, or one that overlaps; torch.save stores as it is")
        for info in archive.infolist():
            if info.filename.endswith(".pkl"):
                yield read(io.BytesIO(archive.read(info)), any_name=True)


def _check_storages(content: Any, size: int) -> None:
    """Check that the storages declared by a pickle of torch.save are not larger than the file."""
    declared: dict[Any, int] = {}
    todo, seen = [content], set()
    while todo:
        item = todo.pop()
        if id(item) in seen:
            continue
        if isinstance(item, dict):
            todo += item.values()
        elif isinstance(item, (list, tuple)):
            todo += item
        elif isinstance(item, Record):
            todo += item.arguments
            todo.append(item.state)
            if item.name == PERSISTENT_ID and isinstance(item.arguments[0], tuple):
                _, _, key, _, numbers, *_ = item.arguments[0]
                if type(numbers) is not int or numbers < 0:
                    raise ValueError("a storage's size is not an integer")
                declared[_key(key)] = max(declared.get(key, 0), numbers)
        else:
            continue
        seen.add(id(item))
    if not sum(declared.values()) <= size:
        raise ValueError(f"its tensors claim {sum(declared.values())} numbers, more than the file holds")
