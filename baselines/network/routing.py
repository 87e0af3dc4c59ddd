"""Functions that a module calls by itself, led through child modules, where they can be quantized and watched.

An attention module multiplies queries and keys with an operator, calls one fused function for everything, or hands
the weight of a linear layer to a function instead of calling the layer. A routed module does the same through modules:
`Product`, `DotProductAttention` and the layer.
Its own forward pass stays as it is written; which calls are led where was found by watching one
(`baselines.network.trace`).
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from baselines.network.attention import DotProductAttention, Product
from baselines.network.quantizable import QUANTIZABLE, is_quantizable
from baselines.network.trace import Operation, Trace

_MATMULS = {
    *(torch.matmul, torch.linalg.matmul, torch.bmm, torch.mm),
    *(Tensor.matmul, Tensor.bmm, Tensor.mm, Tensor.__matmul__, Tensor.__rmatmul__),
}
_ADDED_MATMULS = {torch.baddbmm, torch.addmm, torch.addbmm, Tensor.baddbmm, Tensor.addmm, Tensor.addbmm}
_PRODUCTS = {*_MATMULS, *_ADDED_MATMULS, torch.einsum}
_ATTENTION = functional.scaled_dot_product_attention
NUMBERED = {*_PRODUCTS, _ATTENTION}
"""Functions whose calls are numbered, to be led through modules."""
_OF_LAYERS = dict(
    zip((functional.conv1d, functional.conv2d, functional.conv3d, functional.linear), QUANTIZABLE, strict=True)
)
"""Functions that compute what torch's layers do."""
_CONV_SETTINGS = ("stride", "padding", "dilation", "groups")


@dataclass(frozen=True)
class Routes:
    """Where the calls of one module are led.

    Attributes:
        owner: the module's name.
        numbered: for each call of a product or of fused attention, in order: `"product"`, `"attention"`, or
            `None` for one that stays as it is, since a factor is no activation.
        layers: names, relative to the module, of layers whose weight it hands to a function.
    """

    owner: str
    numbered: tuple[str | None, ...]
    layers: tuple[str, ...]


def find_routes(model: nn.Module, record: Trace) -> list[Routes]:
    """Routes for each module of `model` that calls products, fused attention, or functions with a layer's weight."""
    constants = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    modules = dict(model.named_modules())
    routes = []
    for owner in dict.fromkeys(operation.owner for operation in record.operations):
        if is_quantizable(modules[owner]) or isinstance(modules[owner], (Product, _Routed)):
            continue
        calls: dict[int, list[Operation]] = {}
        for operation in record.operations:
            if operation.owner == owner:
                calls.setdefault(operation.call, []).append(operation)
        numbered = [
            tuple(_kind(operation, constants) for operation in call if operation.function in NUMBERED)
            for call in calls.values()
        ]
        if any(kinds != numbered[0] for kinds in numbered):
            continue  # calls that differ cannot be numbered; what stays in floating point is said later
        layers = _layers_used(modules[owner], [operation for call in calls.values() for operation in call])
        if layers or any(numbered[0]):
            routes.append(Routes(owner, numbered[0], layers))
    return routes


def _kind(operation: Operation, constants: set[int]) -> str | None:
    if operation.function is _ATTENTION:
        return "attention"
    factors = _factors(operation.function, operation.args, operation.kwargs)
    if factors is None or any(t.untyped_storage().data_ptr() in constants for t in factors[:2]):
        return None
    return "product"


def _layers_used(module: nn.Module, operations: list[Operation]) -> tuple[str, ...]:
    """Names of the layers inside of `module` whose weights these operations use as the layer would."""
    plain = {name: layer for name, layer in module.named_modules() if type(layer) in QUANTIZABLE}
    layers = {name: layer for name, layer in plain.items() if is_quantizable(layer)}
    found = []
    for operation in operations:
        call = _LayerCall.of(operation.function, operation.args, operation.kwargs)
        found += [name for name, layer in layers.items() if call is not None and call.is_as_of(layer)][:1]
    return tuple(dict.fromkeys(found))


@dataclass(frozen=True)
class _LayerCall:
    """A call of a function that computes what a layer does."""

    kind: type[nn.Module]
    input: Tensor
    weight: Tensor
    bias: Tensor | None
    settings: dict[str, object]

    @classmethod
    def of(cls, function: Callable, args: tuple, kwargs: dict) -> "_LayerCall | None":
        if function not in _OF_LAYERS:
            return None
        given = dict(zip(("input", "weight", "bias", *_CONV_SETTINGS), args, strict=False)) | kwargs
        parts = given.pop("input"), given.pop("weight"), given.pop("bias", None)
        return cls(_OF_LAYERS[function], *parts, given)

    def is_as_of(self, layer: nn.Module) -> bool:
        """Whether this is what `layer` computes, its bias aside."""
        if not isinstance(layer, self.kind) or layer.weight is not self.weight:
            return False
        if self.kind is nn.Linear:
            return True
        size = len(layer.kernel_size)
        given = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | self.settings
        return layer.padding_mode == "zeros" and all(
            _spelled_out(given[name], size) == _spelled_out(getattr(layer, name), size) for name in _CONV_SETTINGS
        )

    def led_through(self, layer: nn.Module) -> Tensor:
        """What the call gives, computed by `layer` or its quantized twin."""
        output = layer(self.input)
        if self.bias is layer.bias:
            return output
        shape = (-1,) if self.kind is nn.Linear else (-1, *(1,) * len(layer.kernel_size))
        if layer.bias is not None:
            output = output - layer.bias.view(shape)
        return output if self.bias is None else output + self.bias.view(shape)


def _spelled_out(setting: object, size: int) -> object:
    """A setting of a convolution with one number for each axis."""
    if isinstance(setting, str):
        return setting
    values = tuple(setting) if isinstance(setting, (tuple, list)) else (setting,)
    return values * size if len(values) == 1 else values


def _factors(function: Callable, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor, Callable] | None:
    """The two factors of a call, and the call as a function of these; `None` if there are more or fewer than two."""
    if function in _MATMULS:
        values = (*args, *kwargs.values())
        return (*values, function) if len(values) == 2 else None
    if function in _ADDED_MATMULS and len(args) == 3:
        return args[1], args[2], lambda left, right: function(args[0], left, right, **kwargs)
    if function is torch.einsum:
        factors = args[1] if isinstance(args[1], (tuple, list)) else args[1:]
        return (*factors, lambda left, right: torch.einsum(args[0], left, right)) if len(factors) == 2 else None
    return None


def route(model: nn.Module, routes: Routes) -> None:
    """Lead the calls of one module of `model`, in place: the same module, of a class that inherits from its own."""
    module = model.get_submodule(routes.owner)
    kinds = {"product": Product, "attention": DotProductAttention}
    name = "products"
    while hasattr(module, name):  # the user's own
        name = f"routed_{name}"
    module.add_module(name, nn.ModuleList(kinds[kind]() for kind in routes.numbered if kind is not None))
    module._routes, module._products_name = routes, name
    module.__class__ = _routed_class(type(module))


class _Routed(nn.Module):
    """Mixed into the class of a routed module."""

    _routes: Routes
    _products_name: str

    def forward(self, *args: object, **kwargs: object) -> object:
        with _Router(self):
            return super().forward(*args, **kwargs)

    def __reduce__(self) -> tuple:
        return _blank, (type(self).__mro__[2],), self.__dict__


@functools.cache
def _routed_class(kind: type[nn.Module]) -> type[nn.Module]:
    return type(kind.__name__, (_Routed, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _blank(kind: type[nn.Module]) -> nn.Module:
    routed = _routed_class(kind)
    return routed.__new__(routed)


_innermost = threading.local()


class _Router(TorchFunctionMode):
    """Leads the calls of one forward pass of one module.

    Modules inside call functions, too; those of routed ones and of the modules that calls are led to are not counted,
    and no others call products.
    """

    def __init__(self, module: _Routed) -> None:
        super().__init__()
        self._module = module
        self._count = 0
        products = iter(module.get_submodule(module._products_name))
        self._targets = [None if kind is None else next(products) for kind in module._routes.numbered]
        self._layers = [module.get_submodule(name) for name in module._routes.layers]

    def __enter__(self) -> "_Router":
        self._outside = getattr(_innermost, "router", None)
        _innermost.router = self
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        _innermost.router = self._outside
        super().__exit__(*exception)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _innermost.router is not self or not (function in NUMBERED or function in _OF_LAYERS):
            return function(*args, **kwargs)
        _innermost.router = None
        try:
            return self._lead(function, args, kwargs)
        finally:
            _innermost.router = self

    def _lead(self, function: Callable, args: tuple, kwargs: dict) -> Tensor:
        if function in _OF_LAYERS:
            call = _LayerCall.of(function, args, kwargs)
            layer = next((layer for layer in self._layers if call.is_as_of(layer)), None)
            return function(*args, **kwargs) if layer is None else call.led_through(layer)
        target = self._next_target()
        if target is None:
            return function(*args, **kwargs)
        if function is _ATTENTION:
            return target(*args, **kwargs)
        return target(*_factors(function, args, kwargs))

    def _next_target(self) -> nn.Module | None:
        if self._count == len(self._targets):
            raise ValueError(
                f"{self._module._routes.owner} ({type(self._module).__name__}) computes more products than the "
                f"{len(self._targets)} that were seen when it was converted; its control flow depends on data: give "
                "each path a module of its own"
            )
        self._count += 1
        return self._targets[self._count - 1]
