"""From a floating-point network to two private copies: the FP twin, batch norm folded, and the quantized one."""

from __future__ import annotations

import copy
import itertools
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from baselines.attention import MultiheadAttention, Product
from baselines.layers import QUANTIZABLE, is_quantizable, looks_quantizable, quantize_on_entry
from baselines.quantizers import ActivationQuantizer, WeightQuantizer
from baselines.routing import WEIGHTED, Routes, find_routes, route
from baselines.specs import OFF, QuantSpec
from baselines.summary import FloatingPoint, operations_in_floating_point
from baselines.trace import Call, Trace, Value, tensors_in, trace
from baselines.units import quantized_layers

logger = logging.getLogger(__name__)

HALF = (torch.float16, torch.bfloat16)

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def plain_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` in eval mode, without gradients, forward hooks and in-place activations, in which all that
    can be quantized is a module: linear layers and products of two activations, inside of attention, too.

    Half precision becomes float32: reconstruction moves scales by less than half precision can hold.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for module in twin.modules():
        module._forward_hooks.clear()
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    for tensor in itertools.chain(twin.parameters(), twin.buffers()):
        if tensor.dtype in HALF:
            tensor.data = tensor.data.float()
    opened = _with_open_attention(twin, example)
    return _with_routes(opened, example)


def _with_open_attention(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` with each ``nn.MultiheadAttention`` in parts."""
    names = [name for name, module in model.named_modules() if type(module) is nn.MultiheadAttention and name]
    if not names:
        return model
    record = trace(model, example)
    twin = copy.deepcopy(model)
    for name in names:
        inputs = [[value.tensor for value in call.inputs[:3]] for call in record.of(name)]
        packed = bool(inputs) and all(len(i) == 3 and i[0] is i[1] and i[0] is i[2] for i in inputs)
        _replace(twin, name, MultiheadAttention(twin.get_submodule(name), packed))
    if _same_outputs(model, twin, example):
        return twin
    logger.warning("attention stays whole, since its parts gave other outputs: %s", names)
    return model


def _with_routes(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` in which functions that can be quantized are led through modules."""
    routes = find_routes(model, trace(model, example))
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

    A batch norm is folded into the convolution or linear layer whose output it alone reads; others stay.
    """
    twin = plain_copy(model, example)
    record = trace(twin, example)
    pairs = [(call.name, _foldable_source(call, record)) for call in record.calls]
    pairs = [(norm, layer) for norm, layer in pairs if layer is not None]
    folded = _with_folded(twin, pairs)
    if _same_outputs(twin, folded, example):
        return folded
    for pair in pairs:  # some layer's output is also read by a function: find it
        folded = _with_folded(twin, [pair])
        if _same_outputs(twin, folded, example):
            twin = folded
        else:
            logger.warning("batch norm %s stays: the output of %s is used elsewhere, too", *pair)
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
        _replace(twin, norm_name, nn.Identity())
    return twin


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


def quantized_copy(folded: nn.Module, record: Trace, blocks: list[str], spec: QuantSpec) -> nn.Module:
    """A copy of ``folded`` whose layers are quantized layers (weights not yet rounded, activation ranges not yet set).

    An activation is quantized where quantized layers read it: on entry to a block if one of the block's layers reads
    the block's own input (the shortcut then sees the quantized tensor, too), else at the layer; layers that read the
    same tensor share a quantizer. The network's input stays as it is: images already lie on a grid of 256 values.

    Raises:
        ValueError: there is no layer to quantize.
    """
    network = copy.deepcopy(folded)
    modules = dict(network.named_modules())
    called = {name for name in record.started if is_quantizable(modules[name])}
    names = record.order(list(called))
    if not names:
        kinds = ", ".join(kind.__name__ for kind in QUANTIZABLE)
        raise ValueError(f"{type(folded).__name__} has no layer to quantize; what is quantized: {kinds}")
    left = unquantized(folded, record)
    if left:
        logger.warning("left in floating point, since not called or of a kind that is not quantized: %s", list(left))
    network.floating_point = FloatingPoint(
        operations=operations_in_floating_point(folded, record), unquantized=tuple(left)
    )
    for name in names:
        is_edge = name in (names[0], names[-1])
        bits = spec.weight_bits(is_edge)
        layer = QUANTIZABLE[type(modules[name])].of(modules[name])
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        if bits != OFF:
            layer.weight_quantizer = WeightQuantizer(layer.weight, bits, spec.range_method)
        _replace(network, name, layer)
    if spec.a_bits != OFF:
        _place_input_quantizers(network, record, blocks, names, spec)
    return network


def _place_input_quantizers(
    network: nn.Module, record: Trace, blocks: list[str], names: list[str], spec: QuantSpec
) -> None:
    layers = quantized_layers(network)
    entries = [(block, record.of(block)[0].inputs[0]) for block in blocks]
    network_input = record.of(names[0])[0].inputs[0]
    made: list[tuple[Value, ActivationQuantizer]] = []
    for name in names:
        values = [call.inputs[0] for call in record.of(name)]
        if all(value.same(network_input) for value in values):
            continue
        bits = spec.activation_bits(name == names[-1])
        layers[name].input_bits = bits
        if len(values) > 1:  # not all of its inputs enter the block, or go to the same readers
            layers[name].input_quantizer = _quantizer_for(values[0], bits)
            continue
        value = values[0]
        quantizer = next((quantizer for other, quantizer in made if value.same(other)), None)
        if quantizer is None:
            quantizer = _quantizer_for(value, bits)
            made.append((value, quantizer))
        entered = [block for block, entry in entries if value.same(entry) and name.startswith(f"{block}.")]
        if not entered:
            layers[name].input_quantizer = quantizer
        elif not hasattr(network.get_submodule(entered[0]), "input_quantizer"):
            block = network.get_submodule(entered[0])
            block.input_quantizer = quantizer
            block.register_forward_pre_hook(quantize_on_entry)
    for name, module in network.named_modules():
        if isinstance(module, Product) and record.of(name):
            left, right = record.of(name)[0].inputs[:2]
            module.left_quantizer = _quantizer_for(left, spec.a_bits)
            module.right_quantizer = _quantizer_for(right, spec.a_bits)


def _quantizer_for(value: Value, bits: int) -> ActivationQuantizer:
    return ActivationQuantizer(bits).to(value.tensor.device, value.tensor.dtype)


def unquantized(folded: nn.Module, record: Trace) -> tuple[str, ...]:
    """What a user would expect to be quantized and is not: names of modules, and of functions with their module."""
    modules = dict(folded.named_modules())
    called = set(record.started)
    names = [
        name
        for name, module in modules.items()
        if looks_quantizable(module) and not (is_quantizable(module) and name in called)
    ]
    for operation in record.operations:
        module = modules[operation.owner]
        if operation.function in WEIGHTED and not isinstance(module, Product) and not looks_quantizable(module):
            names.append(f"{operation.function.__name__} in {operation.owner or type(folded).__name__}")
    return tuple(dict.fromkeys(names))


@torch.no_grad()
def set_activation_ranges(
    folded: nn.Module,
    network: nn.Module,
    inputs: Tensor,
    spec: QuantSpec,
    *,
    batch_size: int,
    generator: torch.Generator,
    budget: int = 1 << 20,
) -> None:
    """Choose the range of every activation quantizer of ``network`` from one pass of the FP twin over ``inputs``.

    Of every quantized tensor, ``budget`` random elements and the extremes are kept.

    Raises:
        ValueError: an activation that is not finite, or none at all (says of which module).
    """
    places = _quantized_places(network)
    samples: list[list[Tensor]] = [[] for _ in places]
    share = max(1, -(-budget * batch_size // len(inputs)))

    def watch(place: int, position: int):
        def hook(module, args, kwargs):
            flat = tensors_in(args, kwargs)[position].flatten()
            if flat.numel() > share:
                chosen = torch.randint(flat.numel(), (share,), generator=generator, device=flat.device)
                flat = torch.cat([flat[chosen], *(end.view(1) for end in flat.aminmax())])
            samples[place].append(flat)

        return hook

    handles = [
        folded.get_submodule(name).register_forward_pre_hook(watch(place, position), with_kwargs=True)
        for place, (name, position, _) in enumerate(places)
    ]
    try:
        for batch in inputs.split(batch_size):
            folded(batch)
    finally:
        for handle in handles:
            handle.remove()
    for (name, _, quantizer), seen in zip(places, samples, strict=True):
        if not seen:
            raise ValueError(f"{name} was not reached; control flow that depends on data hides it")
        sample = torch.cat(seen)
        if not torch.isfinite(sample).all():
            raise ValueError(
                f"the input of {name} holds NaN or infinite values in the full-precision network; check its weights "
                "and the scale of the calibration inputs"
            )
        quantizer.set_range(sample, spec.range_method)


def _quantized_places(network: nn.Module) -> list[tuple[str, int, ActivationQuantizer]]:
    """Where activations are quantized: module, which of its inputs, and the quantizer; shared ones once."""
    places: list[tuple[str, int, ActivationQuantizer]] = []
    for name, module in network.named_modules():
        attributes = ("left_quantizer", "right_quantizer") if isinstance(module, Product) else ("input_quantizer",)
        for position, attribute in enumerate(attributes):
            quantizer = getattr(module, attribute, None)
            known = any(quantizer is other for _, _, other in places)
            if isinstance(quantizer, ActivationQuantizer) and not known:
                places.append((name, position, quantizer))
    return places


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the one called ``name``, wherever else that one is registered, too."""
    old = model.get_submodule(name)
    for parent in model.modules():
        for child, value in parent._modules.items():
            if value is old:
                parent._modules[child] = module
