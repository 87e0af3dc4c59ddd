"""One forward pass, watched: which module was called when, and which tensor went from which module into which.

Tensors are recognised by identity, so no symbolic tracing is needed and any control flow will do.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """One call of one module. ``inputs`` and ``output`` hold the tensors themselves (compare with ``is``)."""

    name: str
    module: nn.Module
    inputs: tuple[Tensor, ...]
    output: object
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

    def readers(self, tensor: Tensor, types: tuple[type[nn.Module], ...] = (nn.Module,)) -> list[Call]:
        """Calls of modules of ``types`` that got ``tensor`` itself as an input."""
        return [c for c in self.calls if isinstance(c.module, types) and any(t is tensor for t in c.inputs)]


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
    stack: list[str] = []
    handles = []

    def enter(name: str):
        def hook(module, args, kwargs):
            record.started.append(name)
            stack.append(name)

        return hook

    def leave(name: str):
        def hook(module, args, kwargs, output):
            stack.pop()
            record.calls.append(Call(name, module, tensors_in(args, kwargs), output, tuple(stack)))

        return hook

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name), with_kwargs=True))
            handles.append(module.register_forward_hook(leave(name), with_kwargs=True))
        record.output = model(x)
    finally:
        for handle in handles:
            handle.remove()
    return record
