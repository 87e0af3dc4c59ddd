"""A private copy of a network in which all that can be quantized is a module."""

import contextlib
import copy
import logging
from types import MethodType

from torch import Tensor, nn

from baselines.network.attention import MultiheadAttention
from baselines.network.comparison import same_outputs
from baselines.network.layer_subclasses import settle
from baselines.network.reference_copy import OF_EVERY_MODULE, holds_half, reference_copy
from baselines.network.routing import Routes, find_routes, route
from baselines.network.trace import Trace, tensors_in, trace

logger = logging.getLogger(__name__)

_HOLDERS = nn.Module, MethodType, list, tuple, dict
"""What holds a module beside `register_module`."""


def plain_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `model` (`reference_copy`) without in-place activations, in which all that can be quantized is a
    module: linear layers and products of two activations, inside of attention, too.

    Raises:
        ValueError: `model` cannot be copied, does not take `example`, or gives no tensor that was found.
    """
    reference = reference_copy(model)
    first_pass(reference, model, example)
    return made_plain(reference, example)


def made_plain(reference: nn.Module, example: Tensor) -> nn.Module:
    """`plain_copy` of what `reference_copy` gave; `reference` stays as it is."""
    twin = _without_inplace(reference, example)
    settle(twin, example, replace_module)
    opened = _with_open_attention(twin, trace(twin, example), example)
    return _with_routes(opened, example)


def _without_inplace(reference: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `reference` whose activations work in place only where others read what they have written.

    Where a shortcut, or anything else, reads the tensor that was written into, the network would be another one.
    """
    twin = copy.deepcopy(reference)
    names = [name for name, module in twin.named_modules() if getattr(module, "inplace", False) is True]
    modules = [twin.get_submodule(name) for name in names]

    def set_all(group: list[nn.Module], value: bool) -> None:
        for module in group:
            module.inplace = value

    def switch_off(group: list[nn.Module]) -> None:
        set_all(group, False)
        if not group or same_outputs(reference, twin, example):
            return
        set_all(group, True)
        if len(group) > 1:
            half = len(group) // 2
            switch_off(group[:half])
            switch_off(group[half:])

    switch_off(modules)
    stay = [name for name, module in zip(names, modules, strict=True) if module.inplace]
    if stay:
        logger.info("work in place, since what they write is read elsewhere, too: %s", stay)
    return twin


def first_pass(reference: nn.Module, model: nn.Module, example: Tensor) -> None:
    """See that `reference`, made from `model`, takes inputs as `example`, and gives something.

    Raises:
        ValueError: it does not; where half precision that became float32 is the reason, that is said.
    """
    try:
        record = trace(reference, example)
    except Exception as error:  # the user's code, which may raise anything
        advice = ""
        if holds_half(model) and ("dtype" in str(error) or "scalar type" in str(error)):
            advice = (
                "; the network is quantized in float32: let its forward pass cast to the type of a weight or of its "
                "input (x.to(self.conv.weight.dtype)) where it names a type of half precision, or give it in float32"
            )
        raise ValueError(
            f"{type(model).__name__} does not take calibration inputs of shape {tuple(example.shape)} and type "
            f"{example.dtype}: {type(error).__name__}: {error}{advice}"
        ) from error
    if not tensors_in(record.output):
        raise ValueError(
            f"{type(model).__name__} gives a {type(record.output).__name__}, in which no tensor was found; a network "
            "gives a tensor, or tensors in tuples, lists, dicts or dataclasses"
        )


def _with_open_attention(model: nn.Module, record: Trace, example: Tensor) -> nn.Module:
    """A copy of `model` with each `nn.MultiheadAttention` in parts."""
    modules = model.named_modules()
    kind = nn.MultiheadAttention.forward
    names = [name for name, module in modules if name and type(module).forward is kind and record.of(name)]
    if not names:
        return model
    twin = copy.deepcopy(model)
    for name in names:
        inputs = [[value.tensor for value in call.inputs[:3]] for call in record.of(name)]
        packed = bool(inputs) and all(len(i) == 3 and i[0] is i[1] and i[0] is i[2] for i in inputs)
        replace_module(twin, name, MultiheadAttention(twin.get_submodule(name), packed))
    _without_nested_tensors(twin)
    with contextlib.suppress(AttributeError):  # of what only torch's class has
        if same_outputs(model, twin, example):
            return twin
    logger.warning("attention stays whole, since its parts gave other outputs: %s", names)
    return model


def _without_nested_tensors(model: nn.Module) -> None:
    """Transformer encoders of PyTorch leave out padding only where nothing in them is to be seen."""
    for name, module in model.named_modules():
        opened = isinstance(module, nn.TransformerEncoder) and any(
            isinstance(part, MultiheadAttention) for part in module.modules()
        )
        if opened and getattr(module, "use_nested_tensor", False):
            module.use_nested_tensor = False
            logger.info("%s computes at padded places, too, where PyTorch's fast path gives zeros", name)


def _with_routes(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of `model` in which functions that can be quantized are led through modules."""
    routes = find_routes(model, example)
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


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the one called `name`, wherever else that one is registered, or held in attributes,
    too."""
    old = model.get_submodule(name)
    for parent in list(model.modules()):
        for child, value in parent._modules.items():
            if value is old:
                parent._modules[child] = module
        for key in vars(parent).keys() - OF_EVERY_MODULE:
            value = vars(parent)[key]
            if isinstance(value, _HOLDERS):
                vars(parent)[key] = _replaced(value, old, module)


def _replaced(value: object, old: nn.Module, new: nn.Module) -> object:
    """`value` with `new` for `old`, in plain lists, tuples and dicts, and as what a method is bound to."""
    if value is old:
        return new
    if isinstance(value, MethodType) and value.__self__ is old:
        own = value.__func__ is getattr(type(old), value.__name__, None)  # and not a function that someone has bound
        return getattr(new, value.__name__) if own and hasattr(new, value.__name__) else MethodType(value.__func__, new)
    if type(value) is list:
        value[:] = [_replaced(each, old, new) for each in value]
    elif type(value) is dict:
        value.update({key: _replaced(each, old, new) for key, each in value.items()})
    elif type(value) is tuple:
        return tuple(_replaced(each, old, new) for each in value)
    return value
