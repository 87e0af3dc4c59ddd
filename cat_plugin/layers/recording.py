"""Functions of tensors by a record of all that they launch: on a GPU, launching a step from Python takes longer than
computing it."""

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Calls before the record, in which libraries choose their kernels."""


class Recorded:
    """`function(given, *inputs)`, a tensor, where `given` may be anything that tensors of these shapes go with.

    From the third call with inputs of some shapes on, a record of what the function launched is played, where the
    device records. What cannot be recorded, such as reading a value on the host, is called as usual.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._record = recorder_for(device)
        self._calls: Counter[Hashable] = Counter()
        self._records: dict[Hashable, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, given: Any, *inputs: Tensor, key: Hashable = None) -> Tensor:
        """The function of these inputs; calls with another `key` have a record of their own."""
        if self._record is None:
            return self._function(given, *inputs)
        key = key, *((each.shape, each.dtype) for each in inputs)
        self._calls[key] += 1
        if key not in self._records and self._calls[key] > WARM_UP:
            self._make(key, given, inputs)
        if key not in self._records:
            return self._function(given, *inputs)
        places, result, replay = self._records[key]
        with torch.no_grad():
            for place, value in zip(places, inputs, strict=True):
                place.copy_(value)
        replay()
        return result.clone()

    def _make(self, key: Hashable, given: Any, inputs: tuple[Tensor, ...]) -> None:
        places = [each.detach().to(self._device, copy=True).requires_grad_(each.requires_grad) for each in inputs]
        made: list[Tensor] = []
        try:
            replay = self._record(lambda: made.append(self._function(given, *places)))
        except torch.OutOfMemoryError:
            self._record = None
            raise
        except RuntimeError as failure:
            logger.info("steps are launched kernel by kernel, since they cannot be recorded: %s", failure)
            self._record = None
        else:
            self._records[key] = places, made[0], replay


def recorder_for(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What makes of a function one that launches all its kernels at once, or None where the device has no such."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    graph_type = getattr(module, "CUDAGraph", None)
    if graph_type is None:
        return None

    def record(function: Callable[[], None]) -> Callable[[], None]:
        before, stream, graph = module.current_stream(), module.Stream(), graph_type()
        stream.wait_stream(before)
        with module.device(device), module.graph(graph, stream=stream, capture_error_mode="thread_local"):
            function()
        before.wait_stream(stream)
        return graph.replay

    return record
