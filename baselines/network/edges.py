"""The first and the last layers of a network, by what they read and give, whatever the order of calls."""

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from baselines.network.attention import Product
from baselines.network.quantizable import looks_quantizable
from baselines.network.trace import Trace, memory_of, tensors_in, trace, uncompiled

_IMAGES, _PARAMETER, _FUNCTION = "images", "parameter", "function with a parameter"
_PRODUCTS = {
    *("convolution", "_convolution", "linear", "matmul", "mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "einsum"),
    *("conv1d", "conv2d", "conv3d", "mkldnn_convolution", "cudnn_convolution"),
}
"""Operators that multiply; with a parameter, they are a layer, too."""

_LOOK_UP = (nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True, kw_only=True)
class Edges:
    """Names of layers.

    Attributes:
        first: those that read the images, with nothing of another layer among it, in any of their calls.
        fed_images: those of `first` that read nothing else, in all of their calls.
        last: those whose output reaches the network's output without another layer between.
    """

    first: frozenset[str] = frozenset()
    fed_images: frozenset[str] = frozenset()
    last: frozenset[str] = frozenset()


@torch.no_grad()
def find_edges(model: nn.Module, example: Tensor) -> Edges:
    """Watch what becomes of the images and of the output of each layer in one pass of `model` over `example`.

    A layer is whatever multiplies by weights, quantized or not, also a product with a parameter that a module calls by
    itself; embeddings only look up. Every operator hands on what its inputs come from; a layer's output comes
    from that layer alone. Memory that is written into comes from all that was written. A product with a buffer is a
    layer for itself only: what a fixed filter makes of the images is still read by a first layer.
    """
    names = {module: name for name, module in model.named_modules()}
    layers = [module for module in names if _is_layer(module)]
    origins = _Origins()
    reads: dict[str, list[set[str]]] = {}
    fixed: set[str] = set()

    def enter(module: nn.Module, args: tuple, kwargs: dict[str, object]) -> None:
        taken = tensors_in(args, kwargs)
        data = taken[1 - module.weight_at] if isinstance(module, Product) else next(iter(taken), None)
        reads.setdefault(names[module], []).append(origins.of(tensors_in(data)))

    def leave(module: nn.Module, args: tuple, kwargs: dict[str, object], output: object) -> None:
        made, before = tensors_in(output), set()
        if isinstance(module, Product) and not origins.reached(args[module.weight_at : module.weight_at + 1]):
            fixed.add(names[module])
            before = origins.of(made)
        origins.begin(made, names[module], *before)

    origins.begin(model.parameters(), _PARAMETER)
    images = example.clone()
    origins.begin([images], _IMAGES)
    with contextlib.ExitStack() as hooks:
        for module in layers:
            hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
            hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
        with uncompiled(), origins:
            given = origins.of(tensors_in(model(images)))
    of_images = {name: [origin - fixed == {_IMAGES} for origin in found] for name, found in reads.items()}
    return Edges(
        first=frozenset(name for name, found in of_images.items() if any(found)),
        fed_images=frozenset(name for name, found in of_images.items() if all(found)),
        last=frozenset(names[module] for module in layers) & given,
    )


def _is_layer(module: nn.Module) -> bool:
    if isinstance(module, Product):
        return module.weight_at is not None
    return looks_quantizable(module) and not isinstance(module, _LOOK_UP)


@torch.no_grad()
def trace_of_constants(model: nn.Module, example: Tensor) -> tuple[Trace, Callable[[tuple[Tensor, ...]], bool]]:
    """A pass of `example`, and whether tensors of it come from no image and from no parameter."""
    origins, images = _Origins(), example.clone()
    origins.begin(model.parameters(), _PARAMETER)
    origins.begin([images], _IMAGES)
    with uncompiled(), origins:
        record = trace(model, images)
    return record, lambda tensors: not origins.reached(tensors)


class _Origins(TorchDispatchMode):
    """Writes down where the values of each piece of memory come from."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()
        self._of: dict[int, set[str]] = {}
        self._kept: list[Tensor] = []  # memory that is freed would be given to other tensors

    def of(self, tensors: Iterable[Tensor]) -> set[str]:
        """What `tensors` come from, parameters aside."""
        return set().union(*(self._of.get(memory_of(tensor), ()) for tensor in tensors)) - {_PARAMETER}

    def reached(self, tensors: Iterable[Tensor]) -> bool:
        """Whether `tensors` come from anything, parameters included."""
        return any(self._of.get(memory_of(tensor)) for tensor in tensors)

    def begin(self, tensors: Iterable[Tensor], *origin: str) -> None:
        """From now on, `tensors` come from `origin` alone."""
        for tensor in tensors:
            self._kept.append(tensor)
            self._of[memory_of(tensor)] = set(origin)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        taken, given = tensors_in(args, kwargs or {}), tensors_in(result)
        origin = set().union(*(self._of.get(memory_of(tensor), ()) for tensor in taken))
        name = getattr(function, "overloadpacket", function).__name__
        if name in _PRODUCTS and any(self._of.get(memory_of(tensor)) == {_PARAMETER} for tensor in taken):
            origin = {_FUNCTION}
        self._kept.extend(given)
        for tensor in given:  # among them what was written into
            memory = memory_of(tensor)
            self._of[memory] = self._of.get(memory, set()) | origin
        return result
