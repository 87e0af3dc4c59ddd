"""A private copy of a floating-point network: all that can be quantized is a module, and batch norm is folded."""

from __future__ import annotations

import copy
import itertools
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from baselines.network.attention import MultiheadAttention
from baselines.network.routing import Routes, find_routes, route
from baselines.network.trace import Call, Trace, tensors_in, trace
from baselines.quantization.layers import is_quantizable

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def plain_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` in eval mode, without gradients, hooks and in-place activations, in which all that can be
    quantized is a module: linear layers and products of two activations, inside of attention, too.

    Half precision becomes float32: reconstruction moves scales by less than half precision can hold.

    Raises:
        ValueError: ``model`` cannot be copied, does not take ``example``, or gives no tensor that was found.
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
    """Whether ``hook`` is one of torch's own, of weight or spectral normalisation or pruning: a part of the network."""
    return type(hook).__module__.startswith("torch.nn.utils.")


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
    """A copy of ``model`` with each ``nn.MultiheadAttention`` in parts."""
    names = [name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention and name]
    if not names:
        return model
    twin = copy.deepcopy(model)
    for name in names:
        inputs = [[value.tensor for value in call.inputs[:3]] for call in record.of(name)]
        packed = bool(inputs) and all(len(i) == 3 and i[0] is i[1] and i[0] is i[2] for i in inputs)
        replace_module(twin, name, MultiheadAttention(twin.get_submodule(name), packed))
    if _same_outputs(model, twin, example):
        return twin
    logger.warning("attention stays whole, since its parts gave other outputs: %s", names)
    return model


def _with_routes(model: nn.Module, record: Trace, example: Tensor) -> nn.Module:
    """A copy of ``model`` in which functions that can be quantized are led through modules."""
    routes = find_routes(model, record)
    routed = _routed(model, routes)
    if not routes or _same_outputs(model, routed, example):
        return routed
    for one in routes:
        routed = _routed(model, [one])
        if _same_outputs(model, routed, example):
            model = routed
        else:
            logger.warning("the functions of %s stay as they are: led through modules, they gave other outputs", one)
    return model


def _routed(model: nn.Module, routes: list[Routes]) -> nn.Module:
    twin = copy.deepcopy(model)
    for one in routes:
        route(twin, one)
    return twin


def folded_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A plain copy of ``model`` (:func:`plain_copy`) with batch norm folded.

    A batch norm is folded into the convolution or linear layer whose output it alone reads; others stay. Of the norms
    with an activation inside that timm has, the activation stays as a module of its own.
    """
    hooked = [
        name or type(model).__name__
        for name, module in model.named_modules()
        if not all(map(_computes_a_weight, _hooks(module)))
    ]
    if hooked:
        logger.warning("hooks are not taken over, whether or not they change what the network computes: %s", hooked)
    twin = plain_copy(model, example)
    record = trace(twin, example)
    pairs = [(call.name, _foldable_source(call, record)) for call in record.calls]
    pairs = [(norm, layer) for norm, layer in pairs if layer is not None]
    folded = _with_folded(twin, pairs)
    if _same_outputs(twin, folded, example):
        return folded
    for norm, layer in pairs:  # some layer's output is also read by a function: find it
        folded = _with_folded(twin, [(norm, layer)])
        if _same_outputs(twin, folded, example):
            twin = folded
        else:
            kind = type(twin.get_submodule(norm))
            reason = f"the output of {layer} is used elsewhere, too" if kind in BATCH_NORMS else "its class does more"
            logger.warning("batch norm %s (%s) stays: %s", norm, kind.__name__, reason)
    return twin


def _foldable_source(norm: Call, record: Trace) -> str | None:
    """The name of the layer that ``norm`` can be folded into, if it is a batch norm and there is one."""
    if not isinstance(norm.module, BATCH_NORMS) or norm.module.running_mean is None:
        return None
    value = norm.inputs[0]
    makers = [call for call in record.calls if is_quantizable(call.module) and value.same(call.output)]
    if len(makers) != 1 or any(len(record.of(name)) != 1 for name in (norm.name, makers[0].name)):
        return None
    if isinstance(makers[0].module, nn.Linear) and value.tensor.dim() != 2:
        return None  # batch norm works on axis 1, the linear layer on the last one
    others = [c for c in record.readers(value) if c.name != norm.name and c.name not in norm.parents]
    return None if others else makers[0].name


def _with_folded(model: nn.Module, pairs: list[tuple[str, str]]) -> nn.Module:
    """A copy of ``model`` in which each batch norm (first name) is folded into its layer (second name)."""
    twin = copy.deepcopy(model)
    for norm_name, layer_name in pairs:
        norm, layer = twin.get_submodule(norm_name), twin.get_submodule(layer_name)
        fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
        gain = torch.ones_like(norm.running_var) if norm.weight is None else norm.weight
        shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        fused = fuse(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, gain, shift)
        layer.weight, layer.bias = (nn.Parameter(part.detach(), requires_grad=False) for part in fused)
        replace_module(twin, norm_name, _behind_norm(norm))
    return twin


def _behind_norm(norm: nn.Module) -> nn.Module:
    """What is left of a module when its batch norm has been folded."""
    parts = [getattr(norm, name, None) for name in ("drop", "act")]  # as timm's BatchNormAct2d calls them
    return nn.Sequential(*parts) if all(isinstance(part, nn.Module) for part in parts) else nn.Identity()


@torch.no_grad()
def _same_outputs(model: nn.Module, other: nn.Module, example: Tensor) -> bool:
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
    """Put ``module`` in the place of the one called ``name``, wherever else that one is registered, too."""
    old = model.get_submodule(name)
    for parent in model.modules():
        for child, value in parent._modules.items():
            if value is old:
                parent._modules[child] = module
