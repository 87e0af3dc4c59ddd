"""Functions that a module calls by itself, led through child modules, where they can be quantized and watched.

An attention module multiplies queries and keys with an operator, calls one fused function for everything, or hands
the weight of a linear layer to a function instead of calling the layer. Others multiply by a bare parameter, or filter
with a buffer. A routed module does the same through modules: `Product`, `DotProductAttention` and the layer.
Its own forward pass stays as it is written; which calls are led where was found by watching one
(`baselines.network.trace`).
"""

import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from baselines.network.attention import DotProductAttention, Product
from baselines.network.edges import trace_of_constants
from baselines.network.quantizable import QUANTIZABLE, is_quantizable, looks_quantizable
from baselines.network.trace import Operation, memory_of

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
        numbered: for each call of a product or of fused attention, in order: which of `_KINDS` it is, or `None` for
            one that stays as it is.
        layers: names, relative to the module, of layers whose weight it hands to a function.
        filters: names, relative to the module, of parameters and buffers of no layer that it hands to a function of
            torch's layers as the weight.
        counted: whether the module is led at all; if not, it only keeps its calls apart from those of others.
    """

    owner: str
    numbered: tuple[str | None, ...] = ()
    layers: tuple[str, ...] = ()
    filters: tuple[str, ...] = ()
    counted: bool = True


_KINDS: dict[str, Callable[[], nn.Module]] = {
    "product": Product,
    "weight on the left": functools.partial(Product, weight_at=0),
    "weight on the right": functools.partial(Product, weight_at=1),
    "attention": DotProductAttention,
}
"""What calls are led to."""


def find_routes(model: nn.Module, example: Tensor) -> list[Routes]:
    """Routes for each module of `model` that calls products, fused attention, or functions with a weight, in a pass
    of `example`."""
    record, is_constant = trace_of_constants(model, example)
    stored = {memory_of(tensor) for tensor in (*model.parameters(), *model.buffers())}
    modules = dict(model.named_modules())
    routes, apart = [], []
    for owner in dict.fromkeys(operation.owner for operation in record.operations):
        if isinstance(modules[owner], (Product, _Routed)):
            continue
        calls: dict[int, list[Operation]] = {}
        for operation in record.operations:
            if operation.owner == owner:
                calls.setdefault(operation.call, []).append(operation)
        module, operations = modules[owner], [operation for call in calls.values() for operation in call]
        numbered = [
            tuple(_kind(module, each, stored, is_constant) for each in call if each.function in NUMBERED)
            for call in calls.values()
        ]
        # Calls that differ cannot be numbered; what stays in floating point is said later.
        differ = any(kinds != numbered[0] for kinds in numbered)
        if not is_quantizable(module) and not differ:
            layers, filters = _layers_used(module, operations), _filters_used(module, operations)
            if layers or filters or any(numbered[0]):
                routes.append(Routes(owner, numbered[0], layers, filters))
                continue
        if any(numbered):
            apart.append(owner)
    led = {one.owner for one in routes}
    around = {owner: {name for call in record.of(owner) for name in call.parents} for owner in apart}
    return routes + [Routes(owner, counted=False) for owner in apart if around[owner] & led]


def _kind(
    module: nn.Module, operation: Operation, stored: set[int], is_constant: Callable[[tuple[Tensor, ...]], bool]
) -> str | None:
    """Which of `_KINDS` a call is, if any: a factor that lies in the memory of a parameter or buffer, `stored`, is a
    weight. Where both are, the module is named by itself, or nothing of images or parameters is in the product, as in
    a table of positions, it stays."""
    if operation.function is _ATTENTION:
        return "attention"
    factors = _factors(operation.function, operation.args, operation.kwargs)
    if factors is None or any(factor.layout != torch.strided for factor in factors[:2]):
        return None
    left, right = (memory_of(factor) in stored for factor in factors[:2])
    if not left and not right:
        return "product"
    if (left and right) or looks_quantizable(module) or is_constant(factors[:2]):
        return None
    return "weight on the left" if left else "weight on the right"


def _layers_used(module: nn.Module, operations: list[Operation]) -> tuple[str, ...]:
    """Names of the layers inside of `module` whose weights these operations use as the layer would."""
    plain = {name: layer for name, layer in module.named_modules() if type(layer) in QUANTIZABLE}
    layers = {name: layer for name, layer in plain.items() if is_quantizable(layer)}
    found = []
    for operation in operations:
        call = _LayerCall.of(operation.function, operation.args, operation.kwargs)
        found += [name for name, layer in layers.items() if call is not None and call.is_as_of(layer)][:1]
    return tuple(dict.fromkeys(found))


def _filters_used(module: nn.Module, operations: list[Operation]) -> tuple[str, ...]:
    """Names of the parameters and buffers inside of `module`, those of layers aside, that these operations use as
    weights."""
    if looks_quantizable(module):
        return ()  # it is named by itself
    of_layers = {id(value) for layer in module.modules() if is_quantizable(layer) for value in layer.parameters()}
    own = {name: t for name, t in (*module.named_parameters(), *module.named_buffers()) if id(t) not in of_layers}
    found = []
    for operation in operations:
        call = _LayerCall.of(operation.function, operation.args, operation.kwargs)
        found += [name for name, value in own.items() if call is not None and call.is_with(value)][:1]
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

    def is_with(self, value: Tensor) -> bool:
        """Whether the weight is `value`, or a view of it."""
        return self.weight is value or self.weight._base is value

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
    if not routes.counted:
        module.register_forward_pre_hook(_suspend)
        module.register_forward_hook(_resume, always_call=True)
        return
    name = "products"
    while hasattr(module, name):  # the user's own
        name = f"routed_{name}"
    kinds = [*filter(None, routes.numbered), *("weight on the right" for _ in routes.filters)]
    module.add_module(name, nn.ModuleList(_KINDS[kind]() for kind in kinds))
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


def _suspend(module: nn.Module, args: tuple) -> None:
    """Forward pre-hook of a module whose calls are not those of the module around it."""
    _innermost.suspended = (*getattr(_innermost, "suspended", ()), getattr(_innermost, "router", None))
    _innermost.router = None


def _resume(module: nn.Module, args: tuple, output: object) -> None:
    """Forward hook after `_suspend`."""
    *_innermost.suspended, _innermost.router = _innermost.suspended


class _Router(TorchFunctionMode):
    """Leads the calls of one forward pass of one module.

    Modules inside call functions, too; those of routed ones, of suspended ones and of the modules that calls are led to
    are not counted, and no others call products.
    """

    def __init__(self, module: _Routed) -> None:
        super().__init__()
        self._module = module
        self._count = 0
        routes, products = module._routes, iter(module.get_submodule(module._products_name))
        self._targets = [None if kind is None else next(products) for kind in routes.numbered]
        self._layers = [module.get_submodule(name) for name in routes.layers]
        self._filters = [(attrgetter(name)(module), next(products)) for name in routes.filters]

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
            if layer is not None:
                return call.led_through(layer)
            product = next((product for value, product in self._filters if call.is_with(value)), None)
            if product is None:
                return function(*args, **kwargs)
            return product(
                call.input, call.weight, lambda left, right: function(left, right, call.bias, **call.settings)
            )
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
