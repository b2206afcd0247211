"""Options as fields of a dataclass: from one such class derive the command line, YAML and checks."""

from __future__ import annotations

import argparse
import dataclasses
import math
import reprlib
import types
import typing
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar

from diffratio_fast.command import Parser
from diffratio_fast.errors import UserError
from diffratio_fast.storage import reading

LONGEST_CHOICES = 40
"""Longer lists of choices are in the help text, not beside the option."""
GROUPS = ("the run", "data", "networks", "optimization", "objective", "augmentation")
"""Titles of the groups in ``--help``, in their order."""


_NO_VALUE = object()


def option(
    default: Any,
    help: str,
    *,
    choices: Collection[str] | None = None,
    low: float | None = None,
    high: float | None = None,
    above: float | None = None,
    free: bool = False,
    before: Any = _NO_VALUE,
) -> Any:
    """A field with its help, its bounds (``above`` is exclusive) and whether it may change on resuming.

    ``choices`` may be a table: an option accepts its keys, also those added later. ``before`` is the value
    of runs that were recorded before the option existed: they resume unchanged.
    """
    metadata = {"help": help, "choices": choices, "low": low, "high": high, "above": above, "free": free}
    if before is not _NO_VALUE:
        metadata["before"] = before
    return dataclasses.field(default=default, metadata=metadata)


def flag(name: str) -> str:
    """The field ``name`` as an option of the command line: ``--kebab-case``."""
    return "--" + name.replace("_", "-")


class Options:
    """Base of the dataclasses of options; values are checked on construction.

    A dataclass of one group names it once: ``class DataOptions(Options, group="data")``. A configuration
    inherits several of them, so its fields are flat.
    """

    GROUP: ClassVar[str]

    def __init_subclass__(cls, group: str | None = None) -> None:
        if group is not None:
            cls.GROUP = GROUPS[GROUPS.index(group)]

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            _check(field, getattr(self, field.name))

    @classmethod
    def default(cls, name: str) -> Any:
        """Default of the field ``name``."""
        return getattr(cls, name)


def groups_of(kind: type[Options]) -> dict[str, str]:
    """Field name to the title of its group."""
    bases = [base for base in reversed(kind.__mro__) if issubclass(base, Options) and base is not Options]
    return {name: base.GROUP for base in bases for name in _own_fields(base)}


def _own_fields(kind: type[Options]) -> Iterable[str]:
    own = vars(kind).get("__annotations__", {})
    return (field.name for field in dataclasses.fields(kind) if field.name in own)  # type: ignore[arg-type]


def _check(field: dataclasses.Field[Any], value: Any) -> None:
    rule, name = field.metadata, flag(field.name)
    if rule["choices"] is not None and value not in rule["choices"]:
        raise UserError(f"{name} must be one of {', '.join(rule['choices'])}, not {value}")
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return
    if not math.isfinite(value):
        raise UserError(f"{name} must be finite, not {value}")
    if rule["low"] is not None and value < rule["low"]:
        raise UserError(f"{name} must be at least {rule['low']}, not {value}")
    if rule["above"] is not None and value <= rule["above"]:
        raise UserError(f"{name} must be above {rule['above']}, not {value}")
    if rule["high"] is not None and value > rule["high"]:
        raise UserError(f"{name} must be at most {rule['high']}, not {value}")


def _types(kind: type) -> dict[str, tuple[type, bool]]:
    """Field name to (its type, whether None is allowed)."""
    result = {}
    hints = typing.get_type_hints(kind)
    for name in (field.name for field in dataclasses.fields(kind)):
        hint = hints[name]
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        (kind,) = (part for part in parts if part is not type(None))
        result[name] = (kind, type(None) in parts)
    return result


def _convert(name: str, value: Any, known: tuple[type, bool]) -> Any:
    """A YAML value as the field's type; a value of another type is a ``UserError``."""
    kind, optional = known
    if value is None and optional:
        return None
    if kind is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise UserError(f"{name} is too large") from None
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 1e-3 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
        return value
    raise UserError(f"{name} must be of type {kind.__name__}, not {reprlib.repr(value)}")


def from_mapping(kind: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Checked and converted values of ``kind``'s fields; an unknown key is a ``UserError`` that names it."""
    known = _types(kind)
    for key in values:
        if key not in known:
            raise UserError(f"{where}: unknown key {reprlib.repr(key)}")
    try:
        return {key: _convert(key, value, known[key]) for key, value in values.items()}
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def read_yaml(kind: type, path: Path) -> dict[str, Any]:
    """A YAML file's values of ``kind``'s fields; ``preset`` and ``environment`` are skipped.

    The record of a run (it has an ``environment``) also gets the ``before`` values of newer options.
    """
    try:
        content = reading.read_yaml(path)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a YAML file ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: not a mapping of option names to values")
    values = {str(key): value for key, value in content.items() if key not in ("preset", "environment")}
    older = unrecorded(kind, content) if "environment" in content else {}
    return older | from_mapping(kind, values, str(path))


def unrecorded(kind: type, record: Collection[str]) -> dict[str, Any]:
    """The ``before`` values of the options that are missing in the record of a run."""
    return {
        field.name: field.metadata["before"]
        for field in dataclasses.fields(kind)
        if "before" in field.metadata and field.name not in record
    }


def preset_of(path: Path) -> str | None:
    """The preset recorded in a run's config.yaml, if any."""
    try:
        content = reading.read_yaml(path)
    except (OSError, ValueError):
        return None
    preset = content.get("preset") if isinstance(content, dict) else None
    return preset if isinstance(preset, str) else None


def add_options(parser: Parser, shown: Options) -> None:
    """An option for every field of ``shown``'s class; one that is not given is absent from the result.

    The help shows the values of ``shown``.
    """
    groups = {title: parser.add_argument_group(title) for title in GROUPS}
    group_of, kinds = groups_of(type(shown)), _types(type(shown))
    for field in dataclasses.fields(shown):  # type: ignore[arg-type]
        kind, optional = kinds[field.name]
        default = getattr(shown, field.name)
        choices = field.metadata["choices"]
        text = field.metadata["help"].replace("%", "%%")
        arguments: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
        if kind is bool:
            arguments["action"] = argparse.BooleanOptionalAction
        else:
            arguments["type"] = _optional(kind) if optional and kind is not str else kind
            arguments["choices"] = choices
            if choices is None:
                arguments["metavar"] = {int: "N", float: "X", str: "TEXT"}[kind]
            elif len(",".join(choices)) > LONGEST_CHOICES:
                arguments["metavar"] = "NAME"
                text = f"{text}: {', '.join(choices)}"
        if default is not None and "(default:" not in text:
            text = f"{text} [{default}]"
        arguments["help"] = text
        groups[group_of[field.name]].add_argument(flag(field.name), **arguments)


def _optional(kind: type) -> Any:
    def parse(text: str) -> Any:
        return None if text.lower() == "none" else kind(text)

    parse.__name__ = kind.__name__  # argparse names it in its error
    return parse


def changed_fields(old: Options, new: Options) -> Iterable[str]:
    """Names of the fields that affect training and differ."""
    for field in dataclasses.fields(new):  # type: ignore[arg-type]
        if not field.metadata["free"] and getattr(old, field.name) != getattr(new, field.name):
            yield field.name
