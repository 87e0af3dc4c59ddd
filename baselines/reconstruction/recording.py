"""Work that is done over and over on tensors that stay where they are: recorded once, then launched as a whole.

On a GPU an iteration launches hundreds of small kernels from Python, which takes several times as long as they do.
"""

import contextlib
import functools
import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from types import ModuleType

import torch

logger = logging.getLogger(__name__)

Work = Callable[[], None]
WARM_UP = 2
"""Calls before the record. In them libraries choose their kernels and the optimiser makes its state; the last of them
finds out whether a record can hold what the function does."""


class Repeated:
    """A function that is called many times, by its record from the third call on.

    The function may read and write only tensors that exist before and after it, and draw random numbers only from
    `generator`; when it raises, it can be called again. What it does in Python happens in the first calls and while it
    is recorded. Where the device cannot record, or `record` is false, or the function does what a record cannot hold,
    such as reading a value on the host, it is called as usual.
    """

    def __init__(
        self, function: Work, device: torch.device, generator: torch.Generator, *, record: bool = True
    ) -> None:
        self._function, self._device, self._generator = function, device, generator
        self._calls, self._replay = 0, None
        self._record = recorder_for(device) if record else None

    def __call__(self) -> None:
        self._calls += 1
        if self._record is None:
            self._function()
        elif self._replay is not None:
            self._replay()
        elif self._calls < WARM_UP:
            with _aside(self._device):
                self._function()
        else:
            self._try()

    def _try(self) -> None:
        """Call the function without readings on the host; then, or at the next call, record and replay it."""
        state = self._generator.get_state()
        try:
            if self._calls == WARM_UP:
                with _aside(self._device), _no_reading(self._device):
                    self._function()
                return
            self._replay = self._record(self._function, self._generator)
        except RuntimeError as failure:
            logger.info("iterations are launched kernel by kernel, since they cannot be recorded: %s", failure)
            self._record = None
            self._generator.set_state(state)
            self._function()
        else:
            self._replay()


def recorder_for(device: torch.device) -> Callable[[Work, torch.Generator], Work] | None:
    """What makes of a function one that launches all its kernels at once, or None where the device has no such."""
    module = _module(device)
    graph_type = getattr(module, "CUDAGraph", None)
    if graph_type is None:
        return None

    def record(function: Work, generator: torch.Generator) -> Work:
        graph = graph_type()
        with module.device(device), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # later versions of PyTorch find the generator by themselves, and say so
            if hasattr(graph, "register_generator_state"):
                graph.register_generator_state(generator)
            with module.graph(graph, stream=_stream(device), capture_error_mode="thread_local"):
                function()
        return graph.replay

    return record


def _module(device: torch.device) -> ModuleType | None:
    return None if device.type == "cpu" else torch.get_device_module(device)


def _stream(device: torch.device) -> torch.Stream:
    """The stream on which this thread warms up and records: one for each device, since libraries keep memory for every
    stream."""
    return _stream_of(device, threading.get_ident())


@functools.cache
def _stream_of(device: torch.device, thread: int) -> torch.Stream:
    return _module(device).Stream(device)


@contextlib.contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Inside the block, work is done on the stream on which it is recorded later."""
    module = _module(device)
    if module is None:
        yield
        return
    with module.device(device):
        before, stream = module.current_stream(), _stream(device)
        stream.wait_stream(before)
        with module.stream(stream):
            yield
        before.wait_stream(stream)


@contextlib.contextmanager
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
