"""A private copy of a network in which all that can be quantized is a module."""

import copy
import itertools
import logging

import torch
from torch import Tensor, nn

from baselines.network.attention import MultiheadAttention
from baselines.network.routing import Routes, find_routes, route
from baselines.network.trace import Trace, tensors_in, trace

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `model` in eval mode, without gradients, hooks and in-place activations, in which all that can be
    quantized is a module: linear layers and products of two activations, inside of attention, too.

    Half precision becomes float32: reconstruction moves scales by less than half precision can hold.

    Raises:
        ValueError: `model` cannot be copied, does not take `example`, or gives no tensor that was found.
    """
    twin = _deep_copy(model).eval().requires_grad_(False)
    for module in twin.modules():
        _remove_hooks(module)
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    for tensor in itertools.chain(twin.parameters(), twin.buffers()):
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    record = _first_pass(twin, example)
    opened = _with_open_attention(twin, record, example)
    return _with_routes(opened, record if opened is twin else trace(opened, example), example)


def _deep_copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        computed = [name for name, module in model.named_modules() if any(map(_computes_a_weight, _hooks(module)))]
        advice = (
            f"make the computed weights of {computed} plain ones first: torch.nn.utils.remove_weight_norm, "
            "torch.nn.utils.prune.remove or the like"
            if computed
            else "remove what copy.deepcopy does not take"
        )
        raise ValueError(f"{type(model).__name__} cannot be copied ({error}); {advice}") from error


def _hooks(module: nn.Module) -> list[object]:
    return [hook for kind in _HOOKS for hook in getattr(module, kind).values()]


def _remove_hooks(module: nn.Module) -> None:
    for hooks in (getattr(module, kind) for kind in _HOOKS):
        for key in [key for key, hook in hooks.items() if not _computes_a_weight(hook)]:
            del hooks[key]


def _computes_a_weight(hook: object) -> bool:
    """Whether `hook` is one of torch's own, of weight or spectral normalisation or pruning: a part of the network."""
    return type(hook).__module__.startswith("torch.nn.utils.")


def hooked_modules(model: nn.Module) -> list[str]:
    """Names of the modules whose hooks a plain copy does not take over."""
    modules = model.named_modules()
    return [
        name or type(model).__name__ for name, module in modules if not all(map(_computes_a_weight, _hooks(module)))
    ]


def _first_pass(model: nn.Module, example: Tensor) -> Trace:
    try:
        record = trace(model, example)
    except Exception as error:  # the user's code, which may raise anything
        raise ValueError(
            f"{type(model).__name__} does not take calibration inputs of shape {tuple(example.shape)} and type "
            f"{example.dtype}: {type(error).__name__}: {error}"
        ) from error
    if not tensors_in(record.output):
        raise ValueError(
            f"{type(model).__name__} gives a {type(record.output).__name__}, in which no tensor was found; a network "
            "gives a tensor, or tensors in tuples, lists, dicts or dataclasses"
        )
    return record


def _with_open_attention(model: nn.Module, record: Trace, example: Tensor) -> nn.Module:
    """A copy of `model` with each `nn.MultiheadAttention` in parts."""
    names = [name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention and name]
    if not names:
        return model
    twin = copy.deepcopy(model)
    for name in names:
        inputs = [[value.tensor for value in call.inputs[:3]] for call in record.of(name)]
        packed = bool(inputs) and all(len(i) == 3 and i[0] is i[1] and i[0] is i[2] for i in inputs)
        replace_module(twin, name, MultiheadAttention(twin.get_submodule(name), packed))
    if same_outputs(model, twin, example):
        return twin
    logger.warning("attention stays whole, since its parts gave other outputs: %s", names)
    return model


def _with_routes(model: nn.Module, record: Trace, example: Tensor) -> nn.Module:
    """A copy of `model` in which functions that can be quantized are led through modules."""
    routes = find_routes(model, record)
    routed = _routed(model, routes)
    if not routes or same_outputs(model, routed, example):
        return routed
    for one in routes:
        routed = _routed(model, [one])
        if same_outputs(model, routed, example):
            model = routed
        else:
            logger.warning("the functions of %s stay as they are: led through modules, they gave other outputs", one)
    return model


def _routed(model: nn.Module, routes: list[Routes]) -> nn.Module:
    twin = copy.deepcopy(model)
    for one in routes:
        route(twin, one)
    return twin


@torch.no_grad()
def same_outputs(model: nn.Module, other: nn.Module, example: Tensor) -> bool:
    """Whether both give the same outputs, compared in float64: faster formats of a GPU would blur the difference."""
    tolerance = 1e-4
    try:
        results = [copy.deepcopy(m).double()(example.double()) for m in (model, other)]
    except (RuntimeError, TypeError):  # a network or a device that insists on its own type
        tolerance = 2e-2
        results = [m(example) for m in (model, other)]
    for first, second in zip(*map(tensors_in, results), strict=True):
        if not (first - second).abs().max() <= tolerance * first.abs().max().clamp(min=1e-6):
            return False
    return True


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`, wherever else that one is registered, too."""
    old = model.get_submodule(name)
    for parent in model.modules():
        for child, value in parent._modules.items():
            if value is old:
                parent._modules[child] = module
