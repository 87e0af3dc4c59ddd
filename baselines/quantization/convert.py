"""From the FP twin to the quantized network: layers replaced, quantizers placed, ranges set."""

import contextlib
import copy
import functools
import logging

import torch
from torch import Tensor, nn

from baselines.network.attention import Product
from baselines.network.edges import Edges, find_edges
from baselines.network.floating_point import floating_point
from baselines.network.plain_copy import replace_module
from baselines.network.quantizable import QUANTIZABLE, is_quantizable
from baselines.network.trace import Trace, Value, by_signature, tensors_in
from baselines.quantization.layers import quantize_on_entry, quantized_layers, quantized_twin
from baselines.quantization.operations import axes_by_memory
from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from baselines.quantization.specs import OFF, QuantSpec

logger = logging.getLogger(__name__)


def quantized_copy(folded: nn.Module, record: Trace, blocks: list[str], spec: QuantSpec) -> nn.Module:
    """A copy of `folded` whose layers are quantized layers (weights not yet rounded, activation ranges not yet set).

    An activation is quantized where quantized layers read it: on entry to a block if one of the block's layers reads
    the block's own input (the shortcut then sees the quantized tensor, too), else at the layer; layers that read the
    same tensor with the same bits share a quantizer. Where readers of a block's own input need different bits, each
    quantizes it for itself. The network's input stays as it is: images already lie on a grid of 256 values.

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
    network.floating_point = floating_point(folded, record)
    left = list(network.floating_point.unquantized)
    if left:
        logger.warning("left in floating point, since not called or of a kind that is not quantized: %s", left)
    edges = find_edges(folded, record.images)
    for name in names:
        bits = spec.weight_bits(is_edge=name in edges.first | edges.last)
        layer = quantized_twin(modules[name])
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        if bits != OFF:
            layer.weight_quantizer = WeightQuantizer(layer.weight, bits, spec.range_method)
        replace_module(network, name, layer)
    if spec.a_bits != OFF:
        _place_input_quantizers(network, record, blocks, names, spec, edges)
    _place_factor_quantizers(network, record, spec, edges)
    return network


def _place_input_quantizers(
    network: nn.Module, record: Trace, blocks: list[str], names: list[str], spec: QuantSpec, edges: Edges
) -> None:
    layers = quantized_layers(network)
    values = {name: [call.inputs[0] for call in record.of(name) if call.inputs] for name in names}
    # Some layers make what they read for themselves.
    read = [name for name in names if values[name] and name not in edges.fed_images]
    bits_of = {name: spec.activation_bits(name in edges.last) for name in read}
    entered = _entered_blocks(record, blocks, values, bits_of)
    made: list[tuple[Value, ActivationQuantizer]] = []
    for name, bits in bits_of.items():
        value = values[name][0]
        if len(values[name]) > 1:  # not all of its inputs enter the block, or go to the same readers
            layers[name].input_quantizer = _quantizer_for(value, bits)
            continue
        quantizer = next((q for other, q in made if value.same(other) and q.bits == bits), None)
        if quantizer is None:
            quantizer = _quantizer_for(value, bits)
            made.append((value, quantizer))
        if name not in entered:
            layers[name].input_quantizer = quantizer
            continue
        layers[name].entry_quantizer = (quantizer,)
        block = network.get_submodule(entered[name])
        if not hasattr(block, "input_quantizer"):
            block.input_quantizer = quantizer
            hook = functools.partial(quantize_on_entry, record.of(entered[name])[0].arguments.place)
            block.register_forward_pre_hook(hook, with_kwargs=True)


def _place_factor_quantizers(network: nn.Module, record: Trace, spec: QuantSpec, edges: Edges) -> None:
    """Of products: two activations have the bits of activations, a weight and what it is multiplied with those that a
    layer would have, one range for the whole weight."""
    for name, module in network.named_modules():
        if not isinstance(module, Product) or not record.of(name):
            continue
        bits = [spec.activation_bits(name in edges.last)] * 2
        if name in edges.fed_images:
            bits = [OFF, OFF]
        if module.weight_at is not None:
            bits[module.weight_at] = spec.weight_bits(is_edge=name in edges.first | edges.last)
        module.left_quantizer, module.right_quantizer = (
            None if width == OFF else _quantizer_for(value, width)
            for value, width in zip(record.of(name)[0].inputs[:2], bits, strict=True)
        )


def _entered_blocks(
    record: Trace, blocks: list[str], values: dict[str, list[Value]], bits_of: dict[str, int]
) -> dict[str, str]:
    """The block on entry to which the input of a layer is quantized, for the layers that have one."""
    entered: dict[str, str] = {}
    for block in blocks:
        entry = record.of(block)[0].inputs[0]
        inside = [name for name in bits_of if name.startswith(f"{block}.") and name not in entered]
        readers = [name for name in inside if len(values[name]) == 1 and values[name][0].same(entry)]
        if len({bits_of[name] for name in readers}) == 1:
            entered |= dict.fromkeys(readers, block)
    return entered


def _quantizer_for(value: Value, bits: int) -> ActivationQuantizer:
    return ActivationQuantizer(bits).to(value.tensor.device, value.tensor.dtype)


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
    """Choose the range of every activation quantizer of `network` from one pass of the FP twin over `inputs`.

    Of every quantized tensor, `budget` random elements and the extremes are kept.

    Raises:
        ValueError: an activation that is not finite, or none at all (says of which module).
    """
    places = _quantized_places(network)
    samples: list[list[Tensor]] = [[] for _ in places]
    share = max(1, -(-budget * batch_size // len(inputs)))

    def watch(place: int, position: int):
        def hook(module, args, kwargs):
            value = tensors_in(args, by_signature(module.forward, kwargs))[position]
            if value.numel() <= share:
                samples[place].append(value.flatten().clone())  # what follows may write into it
                return
            chosen = torch.randint(value.numel(), (share,), generator=generator, device=value.device)
            by_memory = value.permute(axes_by_memory(value)).reshape(-1)
            # Where channels come last, `flatten` copies; `take` does not, but is not on every device.
            some = value.take(chosen) if value.device.type == "cpu" else value.flatten()[chosen]
            samples[place].append(torch.cat([some, *(end.view(1) for end in by_memory.aminmax())]))

        return hook

    with contextlib.ExitStack() as hooks:
        for place, (name, position, _) in enumerate(places):
            module = folded.get_submodule(name)
            hooks.enter_context(module.register_forward_pre_hook(watch(place, position), with_kwargs=True))
        for batch in inputs.split(batch_size):
            folded(batch.clone())
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
