"""One forward pass, watched: which module was called when, and which value went from which module into which.

Values are recognised by the identity of their tensor and its version, which changes with every in-place operation. So
no symbolic tracing is needed, and any control flow will do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Value(NamedTuple):
    """A tensor as it was at one moment."""

    tensor: Tensor
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> Value:
        return cls(tensor, tensor._version)

    def same(self, other: Value | None) -> bool:
        """Whether both are the same tensor with nothing written into it between."""
        return other is not None and self.tensor is other.tensor and self.version == other.version


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one module.

    Attributes:
        inputs: all tensors among the arguments; ``output`` is ``None`` unless it is one tensor.
        simple: whether the call was ``module(tensor)``, with nothing else.
        parents: names of the modules that were running.
    """

    name: str
    module: nn.Module
    inputs: tuple[Value, ...]
    output: Value | None
    simple: bool
    parents: tuple[str, ...]


@dataclass
class Trace:
    """All calls of one forward pass; a module comes after the modules that it called."""

    calls: list[Call] = field(default_factory=list)
    started: list[str] = field(default_factory=list)
    output: object = None

    def of(self, name: str) -> list[Call]:
        """The calls of the module called ``name``."""
        return [call for call in self.calls if call.name == name]

    def order(self, names: list[str]) -> list[str]:
        """``names`` in the order in which the modules were first called; those never called are left out."""
        return sorted(set(names) & set(self.started), key=self.started.index)

    def readers(self, value: Value) -> list[Call]:
        """Calls of modules that got ``value`` as an input."""
        return [call for call in self.calls if any(value.same(other) for other in call.inputs)]


def tensors_in(*values: object) -> tuple[Tensor, ...]:
    """All tensors in (nested) tuples, lists and dicts."""
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found.extend(tensors_in(*value))
        elif isinstance(value, dict):
            found.extend(tensors_in(*value.values()))
    return tuple(found)


@torch.no_grad()
def trace(model: nn.Module, x: Tensor) -> Trace:
    """Run ``model(x)`` and record every module call. The model's hooks are as before afterwards."""
    record = Trace()
    running: list[tuple[str, tuple[Value, ...], bool]] = []
    handles = []

    def enter(name: str):
        def hook(module, args, kwargs):
            record.started.append(name)
            simple = len(args) == 1 and isinstance(args[0], Tensor) and not kwargs
            running.append((name, tuple(map(Value.of, tensors_in(args, kwargs))), simple))

        return hook

    def leave(module, args, kwargs, output):
        name, inputs, simple = running.pop()
        value = Value.of(output) if isinstance(output, Tensor) else None
        record.calls.append(Call(name, module, inputs, value, simple, tuple(parent for parent, _, _ in running)))

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave, with_kwargs=True))
        record.output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return record
