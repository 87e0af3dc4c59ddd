"""What of a network stays in floating point."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from baselines.network.attention import Product
from baselines.network.quantizable import is_quantizable, looks_quantizable
from baselines.network.routing import NUMBERED
from baselines.network.trace import Operation, Trace

_WEIGHTED = {
    *NUMBERED,
    *(functional.linear, functional.bilinear, functional.multi_head_attention_forward),
    *(functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(torch.tensordot, torch.inner, torch.mv, torch.dot, torch.linalg.multi_dot, torch.chain_matmul),
    *(Tensor.inner, Tensor.mv, Tensor.dot),
}
"""Functions whose factors a user would expect to be quantized."""

_MOVING = {
    *("contiguous", "clone", "detach", "to", "type", "float", "double", "half", "bfloat16", "copy"),
    *("cat", "concat", "concatenate", "stack", "flatten", "unflatten", "reshape", "repeat", "repeat_interleave"),
    *("getitem", "index_select", "gather", "take", "roll", "flip", "pad", "pixel_shuffle", "channel_shuffle"),
    *("zeros", "ones", "empty", "full", "arange", "linspace", "tensor", "fill", "zero", "masked_fill", "setitem"),
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "alpha_dropout"),
}
"""Operations that move or make values, or do nothing outside of training."""

_SAME = {"iadd": "add", "radd": "add", "isub": "sub", "rsub": "sub", "imul": "mul", "rmul": "mul", "truediv": "div"}


@dataclass(frozen=True, kw_only=True)
class FloatingPoint:
    """What stays in floating point.

    Attributes:
        operations: how often each kind of operation runs in one pass, outside of the quantized layers and products.
        unquantized: what one would expect to be quantized, but is not: modules, and functions with their module.
    """

    operations: Mapping[str, int] = field(default_factory=dict)
    unquantized: tuple[str, ...] = ()


def floating_point(folded: nn.Module, record: Trace) -> FloatingPoint:
    """What stays in floating point when `folded`, a plain network, is quantized."""
    return FloatingPoint(operations=_operations(folded, record), unquantized=_unquantized(folded, record))


def _operations(folded: nn.Module, record: Trace) -> dict[str, int]:
    """How often each kind of operation runs outside of what quantization replaces, most often first."""
    modules = dict(folded.named_modules())
    counts: Counter[str] = Counter()
    for operation in record.operations:
        module = modules[operation.owner]
        if not isinstance(module, Product) and not is_quantizable(module) and _computes(operation):
            counts[_plain_name(operation)] += 1
    return dict(counts.most_common())


def _computes(operation: Operation) -> bool:
    """Whether there are new values, not the old ones elsewhere or in another shape."""
    if _plain_name(operation) in _MOVING or _plain_name(operation).startswith("new_"):
        return False
    if operation.function.__name__.endswith("_") and not operation.function.__name__.endswith("__"):
        return True  # in place
    old = {tensor.untyped_storage().data_ptr() for tensor in operation.inputs}
    return any(tensor.untyped_storage().data_ptr() not in old for tensor in operation.outputs)


def _plain_name(operation: Operation) -> str:
    name = operation.function.__name__.strip("_")
    return _SAME.get(name, name)


def _unquantized(folded: nn.Module, record: Trace) -> tuple[str, ...]:
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
        if operation.function in _WEIGHTED and not isinstance(module, Product) and not looks_quantizable(module):
            names.append(f"{operation.function.__name__} in {operation.owner or type(folded).__name__}")
    return tuple(dict.fromkeys(names))
