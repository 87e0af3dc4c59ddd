"""Scale and offset of a channel put into the layer's weights and bias, where that changes nothing else.

The integers of the weights stay as they are: `scale * (s * integer) = (scale * s) * integer`, so what takes them to
floating point has another factor, and the bias another value.
"""

import copy
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from cat_plugin.correction.channel_affine import ChannelAffine, per_channel
from cat_plugin.running.inference import without_autocast
from cat_plugin.running.outputs import first_tensor

logger = logging.getLogger(__name__)

TOLERANCE = 1e-5
"""Largest difference of a folded layer from the corrected one, as a share of its output's root mean square."""
PROBES = 8
MAGNITUDES = (1.0, 30.0, 1000.0)
"""Sizes of random inputs: a layer that quantizes them by large steps rounds small ones to nothing."""


def fold_into(layer: nn.Module, correction: ChannelAffine) -> nn.Module | None:
    """`layer` with weights and bias of its own that hold the correction, too; None where that gives other outputs.

    Looked for are a floating-point `weight` with the output channels along its first axis and a `bias`, and scales of
    its quantizers, one a channel, which follow the weights. Tried on random inputs: a layer that quantizes its output
    has its correction after that, and one that finds a scale for all channels together would round otherwise.

    Args:
        layer: is not changed, and shares all but what is folded with what is returned.
    """
    if layer._forward_hooks or "forward" in vars(layer):  # what comes before the correction would come after it
        return None
    weight = layer._parameters.get("weight")
    probes = _probes(layer)
    channels = len(correction.scale)
    if probes is None or weight is None or weight.shape[0] != channels or not weight.is_floating_point():
        return None
    if type(weight) not in (nn.Parameter, Tensor) or layer._parameters.get("bias", ...) is ...:
        return None
    with torch.no_grad(), torch.random.fork_rng(), without_autocast(weight):
        try:
            trial = copy.deepcopy(layer).eval()  # the passes leave no trace in the user's layer
            for with_scales in (True, False):
                if _agrees(trial, _scaled(trial, correction, with_scales), correction, probes):
                    return _scaled(layer, correction, with_scales)
        except Exception:  # of layers that take something else
            logger.debug("%s is not folded", type(layer).__name__, exc_info=True)
    return None


def _agrees(layer: nn.Module, folded: nn.Module, correction: ChannelAffine, probes: Tensor) -> bool:
    """Whether `folded` gives what `layer` and its correction give, and this is more than a constant."""
    varies = False
    for size in MAGNITUDES:
        output = first_tensor(layer(probes * size))
        expected = per_channel(output, correction.scale, correction.shift, correction.axis)
        error = (first_tensor(folded(probes * size)) - expected).square().mean().sqrt()
        if not error <= TOLERANCE * expected.square().mean().sqrt():
            return False
        rows = output.movedim(correction.axis, -1).flatten(0, -2)
        varies |= bool((rows.amax(dim=0) > rows.amin(dim=0)).all())
    return varies


def _probes(layer: nn.Module) -> Tensor | None:
    """Random inputs of `layer`; None for one of a kind that is not known."""
    weight = layer._parameters.get("weight")
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None  # attention reads it and does not call it: no hook has acted
    if isinstance(layer, nn.Linear):
        shape = [PROBES, layer.in_features]
    elif isinstance(layer, nn.modules.conv._ConvNd) and not layer.transposed:
        sizes = [
            dilation * (kernel - 1) + 3 for dilation, kernel in zip(layer.dilation, layer.kernel_size, strict=True)
        ]
        shape = [PROBES, layer.in_channels, *sizes]
    else:
        return None
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, device="cpu").to(weight.device, weight.dtype)


def _scaled(layer: nn.Module, correction: ChannelAffine, with_scales: bool) -> nn.Module:
    """A copy of `layer` with the correction in its weight and bias, and in the scales of its quantizers."""
    weight, bias = layer._parameters["weight"], layer._parameters["bias"]
    scale, shift = (part.to(weight.device) for part in (correction.scale, correction.shift))
    copied = _own(layer)
    moved = shift if bias is None else bias * scale + shift
    copied._parameters["weight"] = _parameter(weight * _along_first(scale, weight), weight)
    copied._parameters["bias"] = _parameter(moved, weight)
    if with_scales:
        for holder, registry, name in _scales(copied, len(scale)):
            value = getattr(holder, registry)[name]
            product = (value * scale.to(value).reshape(value.shape)).detach()
            getattr(holder, registry)[name] = _parameter(product, value) if isinstance(value, nn.Parameter) else product
    return copied


def _scales(module: nn.Module, channels: int) -> Iterator[tuple[nn.Module, str, str]]:
    """Scales of quantizers of weights in `module`, one a channel, and where they are; their holders become its own."""
    for name, child in list(module._modules.items()):
        if child is None or "weight" not in name.lower():
            continue
        child = module._modules[name] = _own(child)
        yield from _inside(child, channels)


def _inside(module: nn.Module, channels: int) -> Iterator[tuple[nn.Module, str, str]]:
    for registry in ("_parameters", "_buffers"):
        for name, value in list(getattr(module, registry).items()):
            if value is not None and value.is_floating_point() and value.numel() == channels and "point" not in name:
                yield module, registry, name
    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = _own(child)
            yield from _inside(module._modules[name], channels)


def _own(module: nn.Module) -> nn.Module:
    """Another object with the contents of `module`, whose parameters, buffers and children can be replaced."""
    copied = object.__new__(type(module))
    copied.__dict__.update(module.__dict__)
    for registry in ("_parameters", "_buffers", "_modules"):
        copied.__dict__[registry] = dict(getattr(module, registry))
    return copied


def _parameter(values: Tensor, like: Tensor) -> nn.Parameter:
    return nn.Parameter(values.to(like.dtype), requires_grad=like.requires_grad)


def _along_first(values: Tensor, like: Tensor) -> Tensor:
    return values.view(-1, *[1] * (like.ndim - 1))
