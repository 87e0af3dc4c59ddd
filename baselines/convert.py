"""From a floating-point network to two private copies: the FP twin, batch norm folded, and the quantized one."""

from __future__ import annotations

import copy
import logging

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from baselines.layers import QUANTIZABLE, QuantLayer, is_quantizable, quantize_on_entry
from baselines.quantizers import ActivationQuantizer, WeightQuantizer
from baselines.specs import OFF, QuantSpec
from baselines.trace import Call, Trace, trace
from baselines.units import quantized_layers

logger = logging.getLogger(__name__)

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def folded_copy(model: nn.Module, example: Tensor) -> nn.Module:
    """A copy of ``model`` in eval mode, without gradients and in-place activations, with batch norm folded.

    A batch norm is folded into the convolution or linear layer whose output it alone reads; others stay.

    Raises:
        ValueError: folding changed the outputs of ``example`` (the layer's output was used elsewhere, too).
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for module in twin.modules():
        if getattr(module, "inplace", False) is True:
            module.inplace = False
    record = trace(twin, example)
    for call in record.calls:
        source = _foldable_source(call, record) if isinstance(call.module, _BATCH_NORMS) else None
        if source is not None:
            _fold(source, call.module)
            _replace(twin, call.name, nn.Identity())
    _check_same_outputs(twin, example, record.output)
    return twin


def _foldable_source(norm: Call, record: Trace) -> nn.Module | None:
    """The layer that ``norm`` can be folded into, if there is one."""
    if len(record.of(norm.name)) != 1 or norm.module.running_mean is None:
        return None
    makers = [c for c in record.calls if is_quantizable(c.module) and c.output is norm.inputs[0]]
    if len(makers) != 1 or len(record.of(makers[0].name)) != 1:
        return None
    others = [c for c in record.readers(norm.inputs[0]) if c.name != norm.name and c.name not in norm.parents]
    return None if others else makers[0].module


def _fold(layer: nn.Module, norm: nn.Module) -> None:
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    weight, bias = fuse(layer.weight, layer.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    layer.bias = nn.Parameter(bias.detach(), requires_grad=False)


def _check_same_outputs(twin: nn.Module, example: Tensor, expected: object) -> None:
    with torch.no_grad():
        actual = twin(example)
    if not isinstance(actual, Tensor):
        return
    scale = expected.abs().amax().clamp(min=1)
    error = ((actual - expected).abs().amax() / scale).item()
    tolerance = 1e-3 if actual.dtype in (torch.float32, torch.float64) else 5e-2
    if not error <= tolerance:
        raise ValueError(
            f"folding batch norm changed the model's outputs by {error:.2g} of their range (at most {tolerance:g} "
            "expected): a layer's output is used by a batch norm and elsewhere, or the outputs are not finite"
        )


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
    known: list[tuple[Tensor, ActivationQuantizer | None]] = [(record.of(names[0])[0].inputs[0], None)]
    for name in names:
        tensor = record.of(name)[0].inputs[0]
        if any(tensor is other for other, _ in known):
            layers[name].input_quantizer = next(quantizer for other, quantizer in known if tensor is other)
            continue
        quantizer = ActivationQuantizer(spec.activation_bits(name == names[-1]))
        quantizer = quantizer.to(layers[name].weight.device, layers[name].weight.dtype)
        entered = [block for block, entry in entries if tensor is entry and name.startswith(f"{block}.")]
        if entered:
            block = network.get_submodule(entered[0])
            block.input_quantizer = quantizer
            block.register_forward_pre_hook(quantize_on_entry)
        else:
            layers[name].input_quantizer = quantizer
        known.append((tensor, None if entered else quantizer))


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
    """
    owners: dict[str, ActivationQuantizer] = {}
    for name, module in network.named_modules():
        quantizer = getattr(module, "input_quantizer", None)
        if isinstance(quantizer, ActivationQuantizer) and not any(quantizer is q for q in owners.values()):
            owners[name] = quantizer
    samples: dict[str, list[Tensor]] = {name: [] for name in owners}
    share = max(1, -(-budget * batch_size // len(inputs)))

    def watch(name: str):
        def hook(module, args):
            flat = args[0].detach().flatten()
            if flat.numel() > share:
                chosen = torch.randint(flat.numel(), (share,), generator=generator, device=flat.device)
                flat = torch.cat([flat[chosen], *(end.view(1) for end in flat.aminmax())])
            samples[name].append(flat)

        return hook

    handles = [folded.get_submodule(name).register_forward_pre_hook(watch(name)) for name in owners]
    try:
        for batch in inputs.split(batch_size):
            folded(batch)
    finally:
        for handle in handles:
            handle.remove()
    for name, quantizer in owners.items():
        quantizer.set_range(torch.cat(samples[name]), spec.range_method)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


__all__ = ["QuantLayer", "folded_copy", "quantized_copy", "set_activation_ranges"]
