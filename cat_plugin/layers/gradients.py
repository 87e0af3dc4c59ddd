"""Gradients through a quantized network, and none left in it."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ROUNDINGS = {torch.round, Tensor.round, torch.floor, Tensor.floor, torch.ceil, Tensor.ceil}
ROUNDINGS_IN_PLACE = {torch.round_, Tensor.round_, torch.floor_, Tensor.floor_, torch.ceil_, Tensor.ceil_}
LIMITS = {torch.clamp, Tensor.clamp, torch.clip, Tensor.clip}
LIMITS |= {torch.minimum, Tensor.minimum, torch.maximum, Tensor.maximum}
LIMITS_IN_PLACE = {torch.clamp_, Tensor.clamp_, torch.clip_, Tensor.clip_}
PROTOCOL = "cat_straight_through"
"""Method of quantizers that know how to pass gradients: gives a context in which they do, at the same values."""


@contextmanager
def fitting_through(model: nn.Module) -> Iterator[None]:
    """Inside the block, gradients go through `model` to what is fitted around it, and to none of its own tensors.

    Parameters do not ask for gradients. Quantizers with a method `cat_straight_through` are told, and wherever else the
    model rounds in Python, the gradient passes as if it did not. What it computes stays the same. Afterwards all is
    as it was; tensors that modules remember, such as outputs, are without graphs.
    """
    asking = [each for each in model.parameters() if each.requires_grad and each.is_leaf and not each.is_inference()]
    with ExitStack() as stack:
        stack.callback(forget_graphs, model, remembered_graphs(model))
        for parameter in asking:
            stack.callback(parameter.requires_grad_, True)
            parameter.requires_grad_(False)
        for module in model.modules():
            straight = getattr(module, PROTOCOL, None)
            if callable(straight):
                stack.enter_context(straight())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(_StraightThrough())
        yield


def remembered_graphs(model: nn.Module) -> set[int]:
    """Which tensors that modules remember have a graph, by `id`."""
    return {id(tensor) for tensor in _remembered(model)}


def forget_graphs(model: nn.Module, but: set[int]) -> None:
    """Takes the tensors that modules remember, such as outputs that they write into one tensor over and over, out of
    their graphs, `but` for those that had one before."""
    for tensor in _remembered(model):
        if id(tensor) not in but:
            owner = tensor if tensor._base is None else tensor._base
            if owner.grad_fn is not None:  # of a view, that of its whole
                owner.detach_()


def _remembered(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in (*vars(module).values(), *module._buffers.values()):
            if isinstance(value, Tensor) and value.grad_fn is not None:
                yield value


class _StraightThrough(TorchFunctionMode):
    """Rounding has the gradient 1 instead of 0, and limits have it wherever they change nothing.

    PyTorch's own limits have no gradient at their ends, on which rounding puts a good part of low-bit activations.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _asks(args):
            return func(*args, **kwargs)
        if func in ROUNDINGS or func in ROUNDINGS_IN_PLACE:
            return _Passing.apply(args[0], func, args[1:], kwargs, func in ROUNDINGS_IN_PLACE, True)
        if (func in LIMITS or func in LIMITS_IN_PLACE) and not any(map(_needs_gradient, (*args[1:], *kwargs.values()))):
            return _Passing.apply(args[0], func, args[1:], kwargs, func in LIMITS_IN_PLACE, False)
        return func(*args, **kwargs)


def _asks(args: tuple) -> bool:
    """Whether the gradient of the first argument is asked for."""
    return bool(args) and torch.is_grad_enabled() and _needs_gradient(args[0])


def _needs_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


class _Passing(torch.autograd.Function):
    """`func(x)` with the gradient 1 `everywhere`, or where it changes nothing and 0 elsewhere."""

    @staticmethod
    def forward(ctx, x, func, args, kwargs, in_place, everywhere):
        before = x.clone() if in_place and not everywhere else x
        if in_place:
            ctx.mark_dirty(x)
        out = func(x, *args, **kwargs)
        ctx.save_for_backward(None if everywhere else out == before)
        return out

    @staticmethod
    def backward(ctx, grad):
        (same,) = ctx.saved_tensors
        return grad if same is None else grad * same, None, None, None, None, None
