"""A look at the two models before they run: which layers look quantized, and what was left in training mode."""

import dataclasses

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from cat_plugin.report.size import MAX_BITS, bits_per_number
from cat_plugin.running.weights import is_layer, is_packed, parametrizations, weights_of

MARK = "quant"
"""In names of classes, attributes and graph operators of quantization toolkits, in any case."""

PRODUCTS = ("conv", "linear", "matmul", "addmm", "bmm")
"""In the names of graph operators that multiply by weights, mostly."""


@dataclasses.dataclass(frozen=True)
class LayerCount:
    """How many layers of a model look quantized, of how many that have weights."""

    quantized: int
    total: int

    def __str__(self) -> str:
        return f"{self.quantized} of {self.total} layers look quantized"


def count_layers(model: nn.Module) -> LayerCount:
    """Counts the layers of `model` that look quantized.

    A layer is a module with a weight of two axes or more of its own, or with packed weights. It looks quantized if its
    weight takes few values in each output channel, but more than one, is stored in 8 bits or fewer or as a tensor
    subclass, or if the names of its class, its attributes or its children speak of quantization. In a graph of
    `torch.fx` or `torch.export` that dequantizes, convolutions and matrix products count, and as many as there are
    operators that dequantize look quantized. Toolkits that round weights under other names as they run are not seen.
    """
    if isinstance(model, GraphModule):
        operators = [str(node.target).lower() for node in model.graph.nodes if node.op.startswith("call_")]
        products = sum(any(kind in name for kind in PRODUCTS) for name in operators)
        if rounded := sum(f"de{MARK}" in name for name in operators):
            return LayerCount(min(rounded, products), products)
    layers = [module for module in model.modules() if is_layer(module)]
    return LayerCount(sum(map(_looks_quantized, layers)), len(layers))


def inspect_models(quantized_model: nn.Module, fp_model: nn.Module) -> tuple[LayerCount, list[str]]:
    """The layers of `quantized_model`, and sentences about models left in training mode, without quantized layers, or
    in each other's place."""
    found = []
    for name, model in (("quantized_model", quantized_model), ("fp_model", fp_model)):
        modules = (
            module for module in model.modules() if getattr(module, "training", False)
        )  # frozen scripts have none
        left = [type(module).__name__ for module in modules if _behaves(module)]
        if left:
            found.append(
                f"{len(left)} modules of {name} that behave differently in training, such as {left[0]}, were left in "
                "training mode; CAT ran it in evaluation mode and put the mode back, so call eval() before using it"
            )
    low_bit, full = count_layers(quantized_model), count_layers(fp_model)
    if not low_bit.quantized and full.quantized:
        found.append(
            f"of quantized_model {low_bit}, of fp_model {full}: were the two exchanged? The order is "
            "apply_cat(quantized_model, fp_model, ...)"
        )
    elif full.quantized > full.total / 2:
        found.append(f"of fp_model {full}: it should be the full-precision model that quantized_model was made from")
    return low_bit, found


def _looks_quantized(layer: nn.Module) -> bool:
    names = [*vars(layer), *(name for name, _ in layer.named_children())]
    if (
        is_packed(layer)
        or any(_is_named_so(part) for kept in parametrizations(layer).values() for part in kept)
        or _is_named_so(layer)
        or any(MARK in name.lower() for name in names if getattr(layer, name, None) is not None)
    ):
        return True
    weights = weights_of(layer)
    if any(hasattr(tensor, "__tensor_flatten__") for tensor in weights):
        return True
    return any(bits_per_number(tensor.detach()) <= MAX_BITS and not _is_constant(tensor.detach()) for tensor in weights)


def _is_named_so(layer: nn.Module) -> bool:
    """Whether its class speaks of quantization; that in every `nn.MultiheadAttention` means what is not done to it."""
    return MARK in type(layer).__qualname__.lower() and type(layer) is not NonDynamicallyQuantizableLinear


def _is_constant(weight: Tensor) -> bool:
    """Whether it is as it was initialised, to zero mostly, which takes no quantization."""
    plain = weight.is_floating_point() and weight.layout == torch.strided and not weight.is_meta and weight.numel() > 0
    return plain and bool((weight == weight.flatten()[0]).all())


def _behaves(module: nn.Module) -> bool:
    """Whether the training flag changes what the module gives, as far as its class tells."""
    batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
    return batch_norm or any(kind in type(module).__name__.lower() for kind in ("drop", "stochasticdepth"))
