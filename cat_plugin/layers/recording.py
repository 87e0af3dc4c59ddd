"""Functions of tensors by a record of all that they launch: on a GPU, launching a step from Python takes longer than
computing it."""

import functools
import logging
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

WARM_UP = 2
"""Calls before the record. In them libraries choose their kernels, and the last one finds out whether a record can hold
what the function does."""


class Recorded:
    """`function(given, *inputs)`, a tensor.

    From the third call with inputs of some shapes on, a record of what the function launched is played, where the
    device records; `given` is then that of the record, so it may differ between calls only in what tensors of these
    shapes do not feel. What cannot be recorded, such as reading a value on the host, is called as usual.
    """

    def __init__(self, function: Callable[..., Tensor], device: torch.device) -> None:
        self._function, self._device = function, device
        self._record = recorder_for(device)
        self._calls: Counter[Hashable] = Counter()
        self._records: dict[Hashable, tuple[list[Tensor], Tensor, Callable[[], None]]] = {}

    def __call__(self, given: Any, *inputs: Tensor) -> Tensor:
        """The function of these inputs."""
        if self._record is None:
            return self._function(given, *inputs)
        key = tuple((each.shape, each.dtype) for each in inputs)
        self._calls[key] += 1
        if key not in self._records:
            if self._calls[key] < WARM_UP:
                return self._function(given, *inputs)
            try:
                if self._calls[key] == WARM_UP:
                    places = self._places(inputs)  # there, as in a record, nothing comes from the host
                    with _no_reading(self._device):
                        return self._function(given, *places)
                self._make(key, given, inputs)
            except RuntimeError as failure:
                logger.info("steps are launched kernel by kernel, since they cannot be recorded: %s", failure)
                self._record = None
                self._records.clear()
                return self._function(given, *inputs)
        places, result, replay = self._records[key]
        with torch.no_grad():
            for place, value in zip(places, inputs, strict=True):
                place.copy_(value)
        replay()
        return result.clone()

    def _places(self, inputs: tuple[Tensor, ...]) -> list[Tensor]:
        return [each.detach().to(self._device, copy=True).requires_grad_(each.requires_grad) for each in inputs]

    def _make(self, key: Hashable, given: Any, inputs: tuple[Tensor, ...]) -> None:
        places, made = self._places(inputs), []
        replay = self._record(lambda: made.append(self._function(given, *places)))
        self._records[key] = places, made[0], replay


def recorder_for(device: torch.device) -> Callable[[Callable[[], None]], Callable[[], None]] | None:
    """What makes of a function one that launches all its kernels at once, or None where the device has no such.

    Its records share their memory: they are to be played one at a time, and what they give is to be copied.
    """
    module = _module(device)
    graph_type = getattr(module, "CUDAGraph", None)
    if graph_type is None:
        return None
    pool = module.graph_pool_handle()

    def record(function: Callable[[], None]) -> Callable[[], None]:
        graph, stream = graph_type(), _stream_of(device, threading.get_ident())
        with module.device(device):
            stream.wait_stream(module.current_stream())
            with module.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                function()
        return graph.replay

    return record


def _module(device: torch.device) -> ModuleType | None:
    return None if device.type == "cpu" else torch.get_device_module(device)


@functools.cache
def _stream_of(device: torch.device, thread: int) -> torch.Stream:
    """The stream on which a thread records: one for each device, since libraries keep memory for every stream."""
    return _module(device).Stream(device)


@contextmanager
def _no_reading(device: torch.device) -> Iterator[None]:
    """Inside the block, whatever makes the host wait for the device raises a `RuntimeError`, as in a record, from which
    some versions of PyTorch do not recover."""
    module = _module(device)
    if not hasattr(module, "set_sync_debug_mode"):
        yield
        return
    before = module.get_sync_debug_mode()
    _set_quietly(module, "error")
    try:
        yield
    finally:
        _set_quietly(module, before)


def _set_quietly(module: ModuleType, mode: int | str) -> None:
    with warnings.catch_warnings():  # that the mode is new is nothing to the user
        warnings.simplefilter("ignore")
        module.set_sync_debug_mode(mode)
