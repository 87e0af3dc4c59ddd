"""A second object for a model, with other objects in the place of some of its modules, wherever it holds them."""

from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import nn

from cat_plugin.correction.corrected_layer import CorrectedLayer
from cat_plugin.correction.holders import Renewed, modules_in
from cat_plugin.correction.hook import CATHook


def twin_of(model: nn.Module, replaced: Mapping[int, Callable[[], nn.Module]]) -> nn.Module:
    """A second object for `model`, without the hooks of CAT, with other objects for the modules in it that `replaced`
    has, by their ids.

    Both hold the same parameters, buffers and layers; hooks that are put on the one do not act on the other. Modules
    are replaced among children, and in attributes and hooks of modules as far as `cat_plugin.correction.holders` looks;
    all that hold one that is replaced have other objects, too.
    """
    held = _held_in(model)
    changed = {id(model), *replaced}
    while more := {key for key, (_, parts) in held.items() if key not in changed and not changed.isdisjoint(parts)}:
        changed |= more
    twins = {
        key: replaced[key]() if key in replaced else shallow_copy(module)
        for key, (module, _) in held.items()
        if key in changed
    }
    seen: set[int] = set()

    def update(module: nn.Module) -> None:
        if id(module) not in seen:
            seen.add(id(module))
            module.__dict__.update({name: renewed(value) for name, value in vars(module).items()})

    def renew(module: nn.Module) -> nn.Module:
        if id(module) not in held:  # but made with one of the others
            update(module)
        return twins.get(id(module), module)

    renewed = Renewed(renew)
    for twin in twins.values():
        update(twin)
    for twin in twins.values():
        _leave_fast_path(twin)
    return twins[id(model)]


def shallow_copy(module: nn.Module) -> nn.Module:
    """Another object with the contents of `module`, without the hooks of CAT."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("_compiled_call_impl", None)  # calls the original
    tables = {name: table for name, table in vars(module).items() if "_hooks" in name and isinstance(table, dict)}
    twin.__dict__.update({name: table.copy() for name, table in tables.items()})
    hooks = ((key, hook) for key, hook in module._forward_hooks.items() if not isinstance(hook, CATHook))
    twin.__dict__["_forward_hooks"] = OrderedDict(hooks)
    return twin


def _held_in(model: nn.Module) -> dict[int, tuple[nn.Module, set[int]]]:
    """`model` and all modules in it by their ids, each with the ids of those that it holds itself."""
    held: dict[int, tuple[nn.Module, set[int]]] = {}
    left = [model]
    while left:
        module = left.pop()
        if id(module) not in held:
            parts = modules_in(vars(module))
            held[id(module)] = module, {id(part) for part in parts}
            left += reversed(parts)
    return held


def _leave_fast_path(module: nn.Module) -> None:
    """Makes a transformer encoder's layer call what is in it, where PyTorch would read weights and call nothing.

    The hooked model calls it, since hooks keep PyTorch from its fast path. Left to that is what does no more than its
    weights say, such as layers of PyTorch with a folded correction.
    """
    if isinstance(module, nn.TransformerEncoderLayer) and any(
        isinstance(part, CorrectedLayer) or "forward" in vars(part) or not type(part).__module__.startswith("torch.nn.")
        for part in module.modules()
    ):
        module.activation_relu_or_gelu = 0  # for "another one"; asked by the fast path alone
