"""The tensors of a model: by name, down to the plain ones that hold the data."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

logger = logging.getLogger(__name__)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all parameters and buffers."""
    yield from model.named_parameters()
    yield from model.named_buffers()


def storage_leaves(tensor: Tensor) -> Iterator[Tensor]:
    """The plain tensors that hold the data of `tensor`, which may be a wrapper subclass of quantization tools."""
    if hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        for name in names:
            yield from storage_leaves(getattr(tensor, name))
    else:
        yield tensor.detach()


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all parameters, buffers, and what else the `state_dict` holds."""
    named = dict(named_tensors(model))
    yield from named.items()
    try:
        state = model.state_dict()
    except Exception:  # of other people's hooks
        logger.debug("no state_dict of %s", type(model).__name__, exc_info=True)
        return
    for name, value in state.items():
        if name not in named:
            yield from _tensors(name, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}.{index}", part)
