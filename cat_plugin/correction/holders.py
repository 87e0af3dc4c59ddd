"""Modules in what modules hold besides their children, found and replaced: containers, bound methods, closures."""

import copy
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

HOLDERS = (list, tuple, set, frozenset, dict, MethodType, partial, FunctionType, CellType)
"""What is looked into; objects of other classes are not."""


def modules_in(value: Any) -> list[nn.Module]:
    """The modules that `value` holds, and not what these hold, in order."""
    found: list[nn.Module] = []

    def note(module: nn.Module) -> nn.Module:
        found.append(module)
        return module

    Renewed(note)(value)
    return found


class Renewed:
    """Called with a value, gives another with `renew(module)` for every module that it holds, or itself if all of them
    stay. What several values share, those that it gives share, too.
    """

    def __init__(self, renew: Callable[[nn.Module], nn.Module]) -> None:
        self._renew = renew
        self._done: dict[int, tuple[Any, Any]] = {}  # with the values themselves, so that no other gets an id of theirs

    def __call__(self, value: Any) -> Any:
        if issubclass(type(value), nn.Module):  # as a weakref.proxy of one is not
            return self._renew(value)
        if not issubclass(type(value), HOLDERS):
            return value
        if id(value) not in self._done:
            self._done[id(value)] = value, value  # for one that holds itself
            parts = _parts(value)
            renewed = [self(part) for part in parts]
            if any(new is not part for new, part in zip(renewed, parts, strict=True)):
                self._done[id(value)] = value, _with_parts(value, renewed)
        return self._done[id(value)][1]


def _parts(value: Any) -> list[Any]:
    """What one of `HOLDERS` holds."""
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, partial):
        return [value.func, value.args, value.keywords, vars(value)]
    if isinstance(value, FunctionType):
        return [value.__defaults__, value.__kwdefaults__, vars(value), *(value.__closure__ or ())]
    if isinstance(value, CellType):
        try:
            return [value.cell_contents]
        except ValueError:  # nothing was put into it yet
            return []
    return list(value)


def _with_parts(value: Any, parts: list[Any]) -> Any:
    """One like `value` that holds these `_parts`."""
    if isinstance(value, dict):
        made = copy.copy(value)
        made.clear()
        made.update(zip(parts[: len(value)], parts[len(value) :], strict=True))
        return made
    if isinstance(value, MethodType | CellType):
        return type(value)(*parts)
    if isinstance(value, partial):
        func, args, keywords, attributes = parts
        made = type(value)(func, *args, **keywords)
    elif isinstance(value, FunctionType):
        defaults, keywords, attributes, *cells = parts
        made = FunctionType(value.__code__, value.__globals__, value.__name__, defaults, tuple(cells))
        made.__kwdefaults__, made.__qualname__, made.__module__ = keywords, value.__qualname__, value.__module__
    else:
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    made.__dict__.update(attributes)
    return made
