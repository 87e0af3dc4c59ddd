"""A private copy of the user's network that computes what it computes, ready to be watched: the reference of all forms
of it that follow."""

import contextlib
import copy
import itertools
import logging
from collections.abc import Callable, Iterator
from types import FunctionType

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune, remove_spectral_norm, remove_weight_norm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import tree_leaves, tree_map_only

from baselines.graphs import with_modules

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

_HELD_AS = {"DataParallel": "module", "DistributedDataParallel": "module", "OptimizedModule": "_orig_mod"}
"""By the name of torch's class, since that of compiled modules is private."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
OF_EVERY_MODULE = frozenset(vars(nn.Module()))
"""Attributes that are no network's own."""


def reference_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` in eval mode, without gradients, hooks and containers inside, with weights that
    parametrizations, weight and spectral normalisation or pruning compute as plain ones.

    Half precision becomes float32: reconstruction moves scales by less than half precision can hold.

    Raises:
        ValueError: `model` cannot be copied.
    """
    _refuse_closures(model)
    twin = _deep_copy(model)
    _open_containers(twin)
    twin = with_modules(twin)
    twin.requires_grad_(False)
    for module in twin.modules():
        module.training = False  # hooks and parametrizations compute another weight in training
    for module in list(twin.modules()):
        _make_weights_plain(module)
        for hooks in (getattr(module, kind) for kind in _HOOKS):
            hooks.clear()
    cast_(twin, HALF, torch.float32)
    twin.eval()  # what `train(False)` keeps is kept anew, in float32; some return nothing
    twin.requires_grad_(False)
    return twin


def held_network(model: nn.Module) -> nn.Module:
    """The network inside of `nn.DataParallel`, `DistributedDataParallel` and what `torch.compile` gives; `model` itself
    where it is none of these."""
    while (name := _held_as(model)) is not None:
        model = getattr(model, name)
    return model


def cast_(model: nn.Module, old: tuple[torch.dtype, ...], new: torch.dtype) -> nn.Module:
    """`model` with all tensors of the types `old` in the type `new`, in place; also those that are plain attributes."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        if tensor.dtype in old:
            tensor.data = tensor.data.to(new)
    for module, key, value in _loose_values(model):
        if any(tensor.dtype in old for tensor in _tensors_of(value)):
            vars(module)[key] = tree_map_only(Tensor, lambda t: t.to(new) if t.dtype in old else t, value)
    return model


def restore_types(network: nn.Module, model: nn.Module) -> None:
    """Give what `network`, a quantized copy of `model` in float32, has in common with it the types that it has there,
    in place; what is new has the type of its layer's weight, or of most of the parameters."""
    named = itertools.chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    types = {name: tensor.dtype for name, tensor in named if tensor.is_floating_point()}
    names = {module: name for name, module in model.named_modules()}
    for module, key, value in _loose_values(model):
        types |= {f"{names[module]}.{key}": t.dtype for t in _tensors_of(value) if t.is_floating_point()}
    main = main_type(model)
    for path, module in network.named_modules():
        for values in (module._parameters, module._buffers):
            for key, tensor in values.items():
                if tensor is not None and tensor.dtype == torch.float32:
                    tensor.data = tensor.data.to(_type_of(f"{path}.{key}".lstrip("."), types, main))
    names = {module: name for name, module in network.named_modules()}
    for module, key, value in _loose_values(network):
        new = types.get(f"{names[module]}.{key}")
        if new is not None:
            vars(module)[key] = tree_map_only(Tensor, _to(new), value)


def main_type(model: nn.Module) -> torch.dtype:
    """The floating type of most of the numbers in the parameters of `model`."""
    counts: dict[torch.dtype, int] = {}
    for tensor in model.parameters():
        if tensor.is_floating_point():
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.numel()
    return max(counts, key=counts.__getitem__)


def holds_half(model: nn.Module) -> bool:
    """Whether a parameter or a buffer of `model` is in half precision."""
    return any(tensor.dtype in HALF for tensor in itertools.chain(model.parameters(), model.buffers()))


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose hooks a copy does not take over."""
    modules = model.named_modules()
    return [
        name or type(model).__name__ for name, module in modules if not all(map(_computes_a_weight, _hooks(module)))
    ]


def _open_containers(model: nn.Module) -> None:
    """Put the networks that containers inside of `model` hold in their place."""
    for module in list(model.modules()):
        for name, child in module._modules.items():
            if child is not None:
                module._modules[name] = held_network(child)


def _held_as(model: nn.Module) -> str | None:
    name = _HELD_AS.get(type(model).__name__)
    return name if name is not None and type(model).__module__.startswith("torch.") else None


def _refuse_closures(model: nn.Module) -> None:
    """A copy of a module whose `forward` is a closure over modules of `model` would run these.

    Raises:
        ValueError: there is one.
    """
    modules = {id(module) for module in model.modules()}
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        if _held_as(module) is not None or not isinstance(forward, FunctionType):  # compiled networks are taken out
            continue
        for held in _enclosed(forward):
            if id(getattr(held, "__self__", held)) in modules:
                raise ValueError(
                    f"forward of {name or type(model).__name__} was replaced by a function over modules of the network "
                    "itself, which a copy would go on calling; make it a method (types.MethodType) or functools.partial"
                )


def _enclosed(function: FunctionType) -> Iterator[object]:
    """What `function` is a closure over, and what is in it where that is a list, a tuple or a dict."""
    for cell in function.__closure__ or ():
        with contextlib.suppress(ValueError):  # nothing was put into it yet
            held = cell.cell_contents
            yield held
            yield from held.values() if isinstance(held, dict) else held if isinstance(held, (list, tuple)) else ()


def _deep_copy(model: nn.Module) -> nn.Module:
    """What was computed with gradients, and kept, is copied without them: `copy.deepcopy` does not take it."""
    buffers = (buffer for module in model.modules() for buffer in module._buffers.values() if buffer is not None)
    loose = (tensor for _, _, value in _loose_values(model) for tensor in _tensors_of(value))
    memo = {id(t): t.detach().clone() for t in itertools.chain(buffers, loose) if not t.is_leaf}
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"{type(model).__name__} cannot be copied ({error}); remove what copy.deepcopy does not take"
        ) from error


def _hooks(module: nn.Module) -> list[object]:
    return [hook for kind in _HOOKS for hook in getattr(module, kind).values()]


def _computes_a_weight(hook: object) -> bool:
    """Whether `hook` is one of torch's own, of weight or spectral normalisation or pruning: a part of the network."""
    return type(hook).__module__.startswith("torch.nn.utils.")


@torch.no_grad()
def _make_weights_plain(module: nn.Module) -> None:
    """Let what torch's own tools compute for each pass be computed once, in place."""
    if parametrize.is_parametrized(module):  # torch's own removal changes the class, which the user's module shares
        values = {name: getattr(module, name).detach().clone() for name in module.parametrizations}
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
        for name, value in values.items():
            module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
        elif isinstance(hook, prune.BasePruningMethod):
            prune.remove(module, hook._tensor_name)


def _loose_values(model: nn.Module) -> Iterator[tuple[nn.Module, str, object]]:
    """Tensors that are plain attributes of modules, also in lists, tuples and dicts: module, name, value."""
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if key not in OF_EVERY_MODULE and isinstance(value, (Tensor, list, tuple, dict)) and _tensors_of(value):
                yield module, key, value


def _tensors_of(value: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def _to(new: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.to(new) if tensor.is_floating_point() else tensor


def _type_of(name: str, types: dict[str, torch.dtype], main: torch.dtype) -> torch.dtype:
    if name in types:
        return types[name]
    while name:
        name = name.rpartition(".")[0]
        if f"{name}.weight" in types:
            return types[f"{name}.weight"]
    return main
