"""Dataclasses as what JSON holds of them, and back, with every value checked against its type."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from cat_plugin.errors import CATError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """Inverse of `from_plain`: dataclasses as dicts and tuples as lists, at any depth."""
    if dataclasses.is_dataclass(value):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return [to_plain(part) for part in value] if isinstance(value, tuple) else value


def from_plain(kind: type[T], value: Any, name: str) -> T:
    """`value`, as `json.loads` gives it, as a `kind`: a dataclass, a number, a text, tuples of these, or None.

    Absent fields of a dataclass take their defaults.

    Args:
        name: what errors call the value.

    Raises:
        CATError: the value is of another type, or lacks fields that have no default, or has unknown ones.
    """
    if isinstance(kind, types.UnionType):
        options = [option for option in kind.__args__ if _may_be(option, value)]
        if not options:
            raise CATError(f"{name} is {_short(value)}; expected {kind}")
        kind = next((option for option in options if _knows_fields(option, value)), options[0])
    if dataclasses.is_dataclass(kind):
        return _record(kind, value, name)
    if typing.get_origin(kind) is tuple and isinstance(value, list | tuple):
        item = kind.__args__[0]
        return tuple(from_plain(item, part, f"{name}[{index}]") for index, part in enumerate(value))
    if not _may_be(kind, value):
        raise CATError(f"{name} is {_short(value)}; expected {getattr(kind, '__name__', kind)}")
    return float(value) if kind is float else value


def _record(kind: type[T], value: Any, name: str) -> T:
    if not isinstance(value, Mapping):
        raise CATError(f"{name} is {_short(value)}; expected the fields of a {kind.__name__}")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    unknown = sorted(set(value) - set(fields), key=str)
    required = {name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING}
    missing = sorted(required - set(value))
    if unknown or missing:
        raise CATError(f"{name} has unknown fields {unknown} and lacks {missing}; known are {list(fields)}")
    hints = typing.get_type_hints(kind)
    return kind(**{field: from_plain(hints[field], part, f"{name}.{field}") for field, part in value.items()})


def _may_be(kind: Any, value: Any) -> bool:
    if dataclasses.is_dataclass(kind):
        return isinstance(value, Mapping)
    if typing.get_origin(kind) is tuple:
        return isinstance(value, list | tuple)
    return type(value) is kind or (kind is float and type(value) is int)


def _knows_fields(kind: Any, value: Any) -> bool:
    return not dataclasses.is_dataclass(kind) or set(value) <= {field.name for field in dataclasses.fields(kind)}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
