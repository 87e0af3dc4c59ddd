"""What of a network stays in floating point."""

import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator, OpOverload
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from baselines.network.attention import Product
from baselines.network.edges import trace_of_constants
from baselines.network.quantizable import is_quantizable, looks_quantizable
from baselines.network.routing import NUMBERED
from baselines.network.trace import Operation, Trace, memory_of, tensors_in, uncompiled

logger = logging.getLogger(__name__)

_WEIGHTED = {
    *NUMBERED,
    *(functional.linear, functional.bilinear, functional.multi_head_attention_forward),
    *(functional.embedding, functional.embedding_bag),
    *(functional.conv1d, functional.conv2d, functional.conv3d),
    *(functional.conv_transpose1d, functional.conv_transpose2d, functional.conv_transpose3d),
    *(torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu),
    *(torch.tensordot, torch.inner, torch.mv, torch.dot, torch.linalg.multi_dot, torch.chain_matmul),
    *(Tensor.inner, Tensor.mv, Tensor.dot),
}
"""Functions whose factors a user would expect to be quantized."""

_KERNELS = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "linear", "_trilinear", "convolution"),
    *("_convolution", "mkldnn_convolution", "cudnn_convolution", "mkldnn_rnn_layer", "_cudnn_rnn"),
    *("embedding", "_embedding_bag", "native_multi_head_attention", "_transformer_encoder_layer_fwd"),
}
"""What torch's own functions, and scripted ones, end in where they multiply."""

_TORCHS_OWN = {"aten", "prim", "prims", "profiler", "quantized", "inductor", "higher_order"}

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
    spelled = getattr(operation.function, "__name__", "")
    if spelled.endswith("_") and not spelled.endswith("__"):
        return True  # in place
    old = {memory_of(tensor) for tensor in operation.inputs}
    return any(memory_of(tensor) not in old for tensor in operation.outputs)


def _plain_name(operation: Operation) -> str:
    name = getattr(operation.function, "__name__", type(operation.function).__name__).strip("_")
    return _SAME.get(name, name)


def _unquantized(folded: nn.Module, record: Trace) -> tuple[str, ...]:
    """What a user would expect to be quantized and is not: names of modules, and of functions with their module."""
    modules = dict(folded.named_modules())
    again, is_constant = trace_of_constants(folded, record.images)
    in_products = [operation for operation in again.operations if isinstance(modules[operation.owner], Product)]
    multiplied = {memory_of(tensor) for each in in_products for tensor in each.inputs}
    quantized = set(record.started) | {
        name for name, module in modules.items() if is_quantizable(module) and memory_of(module.weight) in multiplied
    }
    names = [
        name
        for name, module in modules.items()
        if looks_quantizable(module) and not (is_quantizable(module) and name in quantized)
    ]
    for operation in again.operations:
        module = modules[operation.owner]
        known = isinstance(module, Product) or _is_own(operation, module)
        fixed = operation.function in NUMBERED and is_constant(operation.inputs)  # a table, the same for all images
        if operation.function in _WEIGHTED and not known and not fixed:
            names.append(f"{operation.function.__name__} in {operation.owner or type(folded).__name__}")
    names += [f"{function} in {owner or type(folded).__name__}" for owner, function in record.unseen]
    return tuple(dict.fromkeys(names))


def _is_own(operation: Operation, module: nn.Module) -> bool:
    """Whether the operation is what `module`, which is listed by itself, is there for."""
    if not looks_quantizable(module):
        return False
    shape = getattr(getattr(module, "weight", None), "shape", None)
    return not is_quantizable(module) or any(tensor.shape in (shape, shape[::-1]) for tensor in operation.inputs)


@torch.no_grad()
def unseen_products(model: nn.Module, example: Tensor) -> list[tuple[str, str]]:
    """What multiplies, or may, in a pass of `example` without being a function that the trace can name and lead: inside
    of scripted and custom functions. Names of the innermost module that is running, and of the function."""
    found: list[tuple[str, str]] = []
    modules, running = dict(model.named_modules()), [""]

    def report(name: str) -> None:
        if not isinstance(modules[running[-1]], Product) and not is_quantizable(modules[running[-1]]):
            found.append((running[-1], name))

    def enter(name: str):
        return lambda module, args: running.append(name)

    with contextlib.ExitStack() as stack:
        for name, module in modules.items():
            stack.enter_context(module.register_forward_pre_hook(enter(name)))
            stack.enter_context(module.register_forward_hook(lambda *args: running.pop() and None))
        kernels = _Kernels(report)
        for context in (uncompiled(), _Functions(kernels), kernels):
            stack.enter_context(context)
        try:
            model(example.clone())
        except NotImplementedError:  # something does not take being watched from so near
            logger.debug("not watched to the end: %s", type(model).__name__, exc_info=True)
    return list(dict.fromkeys(found))


class _Kernels(TorchDispatchMode):
    """Reports what multiplies outside of the functions that are known, and what no part of torch is."""

    def __init__(self, report: Callable[[str], None]) -> None:
        super().__init__()
        self.report, self.function = report, None

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        kernel, name = function._overloadpacket.__name__, getattr(self.function, "__name__", "")
        if function.namespace not in _TORCHS_OWN:
            if any(tensor.is_floating_point() for tensor in tensors_in(result)):
                self.report(f"{function.namespace}::{kernel}")
        elif kernel in _KERNELS or kernel.startswith(("_scaled_dot_product", "_flash_", "_efficient_")):
            if self.function is None:
                self.report(f"scripted {kernel}")
            elif self.function not in _WEIGHTED:
                self.report(name)
        return result


class _Functions(TorchFunctionMode):
    """Tells `kernels` which function runs."""

    def __init__(self, kernels: _Kernels) -> None:
        super().__init__()
        self._kernels = kernels

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if isinstance(function, HigherOrderOperator):  # such as flex_attention
            self._kernels.report(function.__name__)
            with _disable_current_modes():
                return function(*args, **kwargs)
        if isinstance(function, OpOverload):  # a kernel on its way back
            return function(*args, **kwargs)
        before, self._kernels.function = self._kernels.function, function
        try:
            return function(*args, **kwargs)
        finally:
            self._kernels.function = before
