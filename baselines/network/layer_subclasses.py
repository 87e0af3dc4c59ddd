"""Layers that inherit from torch's and compute otherwise: what they do is found by trying."""

import contextlib
import copy
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from baselines.network.quantizable import QUANTIZABLE, is_subclass, leave

logger = logging.getLogger(__name__)

_WEIGHT_SECOND = {functional.linear, functional.conv1d, functional.conv2d, functional.conv3d}
"""Functions of torch's layers, whose second argument is the weight."""
_RELATIVE_ROUNDING = 1e-3


@dataclass(frozen=True)
class Trial:
    """How a layer computes.

    Attributes:
        reads_weight: its output depends on its weight.
        scales: its output is scaled and shifted, channel by channel, when its weight and bias are.
        merged: what it computes with, where that is more than its weight (low-rank updates merged at call).
        plain: torch's own layer with `merged` as its weight gives the same.
    """

    reads_weight: bool
    scales: bool
    merged: Tensor | None
    plain: bool


@torch.no_grad()
def trials(model: nn.Module, example: Tensor) -> dict[str, Trial]:
    """A trial of each layer of a class of its own, by name, on what reaches its first call in a pass of `example`."""
    found: dict[str, Trial] = {}

    def before(name: str):
        def hook(module, args, kwargs):
            if name not in found:
                found[name] = _trial(module, args, kwargs)

        return hook

    with contextlib.ExitStack() as hooks:
        for name, module in model.named_modules():
            if is_subclass(module):
                hooks.enter_context(module.register_forward_pre_hook(before(name), with_kwargs=True))
        if any(is_subclass(module) for module in model.modules()):
            model(example.clone())
    return found


def settle(model: nn.Module, example: Tensor, replace: Callable[[nn.Module, str, nn.Module], None]) -> None:
    """Make the layers of `model` that are of classes of their own, in place, such that their weight is all that they
    compute with; those of which it is not are left in floating point, and that is said."""
    left = []
    for name, trial in trials(model, example).items():
        layer = model.get_submodule(name)
        if trial.merged is not None and trial.plain:
            replace(model, name, _plain_layer(layer, trial.merged))
        elif trial.merged is not None or not trial.reads_weight:
            leave(layer)
            left.append(name)
    if left:
        logger.warning("left in floating point, since they compute with something else than their weight: %s", left)


def _trial(layer: nn.Module, args: tuple, kwargs: dict[str, object]) -> Trial:
    """The layer is not changed, nor are its arguments."""
    kind = type(layer)
    bare = copy.deepcopy(layer)
    for hooks in (bare._forward_hooks, bare._forward_pre_hooks):
        hooks.clear()

    def run(weight: Tensor, bias: Tensor | None, watch: _Weights | None = None) -> object:
        bare._parameters["weight"], bare._parameters["bias"] = weight, bias
        own_args, own_kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
        with watch or contextlib.nullcontext():
            return kind.forward(bare, *own_args, **own_kwargs)

    weight, bias, watch, negated = layer.weight, layer.bias, _Weights(), _Weights()
    output = run(weight, bias, watch)
    run(-weight, bias, negated)
    # Others within a channel: what is standardised channel by channel does not see a factor that a channel shares.
    factors = torch.linspace(0.5, 2, weight[0].numel(), device="cpu").to(weight).view_as(weight[0])
    other = run(weight * factors, bias)
    merged = None
    used = _matching(watch.taken, weight)
    if used is not None and used is not weight:
        mirrored = _matching(negated.taken, weight)
        if mirrored is None or not _close(mirrored, -used):  # not a function of the weight alone, or one of its sizes
            merged = used.detach().clone()
    with _tolerant() as plain:
        plain.value = merged is not None and _close(_plain_layer(layer, merged)(*args, **kwargs), output)
    with _tolerant() as scales:
        scales.value = isinstance(output, Tensor) and _scales(run, layer, output)
    return Trial(not _close(other, output), scales.value, merged, plain.value)


def _scales(run: Callable[..., object], layer: nn.Module, output: Tensor) -> bool:
    channels = len(layer.weight)
    axis = output.dim() - 1 if isinstance(layer, nn.Linear) else 1
    if output.dim() < 2 or output.shape[axis] != channels:
        return False
    factor = torch.linspace(0.5, 2, channels, device=output.device, dtype=layer.weight.dtype)
    shift = output.abs().amax() * factor.flip(0)
    bias = shift if layer.bias is None else layer.bias * factor + shift
    scaled = run(layer.weight * factor.view(-1, *(1,) * (layer.weight.dim() - 1)), bias)
    shape = [channels if position == axis else 1 for position in range(output.dim())]
    return _close(scaled, output * factor.view(shape) + shift.view(shape))


def _plain_layer(layer: nn.Module, weight: Tensor) -> nn.Module:
    """Torch's own layer of the same settings, with this weight."""
    kind = next(kind for kind in QUANTIZABLE if isinstance(layer, kind))
    names = ("in_features", "out_features")
    if kind is not nn.Linear:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        names = (*names, "padding_mode")
    settings = {name: getattr(layer, name) for name in names}
    plain = kind(**settings, bias=layer.bias is not None, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = layer.bias
    return plain.train(layer.training)


def _matching(weights: list[Tensor], like: Tensor) -> Tensor | None:
    return next((weight for weight in weights if weight.shape == like.shape), None)


def _close(first: object, second: object) -> bool:
    if not isinstance(first, Tensor) or not isinstance(second, Tensor) or first.shape != second.shape:
        return False
    return bool((first - second).abs().max() <= _RELATIVE_ROUNDING * second.abs().max())


class _Tried:
    value = False


@contextlib.contextmanager
def _tolerant() -> Iterator[_Tried]:
    """Within, what fails is a no: a layer may take no bias, or arguments that torch's own does not take."""
    tried = _Tried()
    with contextlib.suppress(RuntimeError, TypeError, ValueError, AttributeError, AssertionError):
        yield tried


class _Weights(TorchFunctionMode):
    """Keeps the weights that the functions of torch's layers take."""

    def __init__(self) -> None:
        super().__init__()
        self.taken: list[Tensor] = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in _WEIGHT_SECOND:
            self.taken.append(args[1] if len(args) > 1 else kwargs["weight"])
        return function(*args, **kwargs)
