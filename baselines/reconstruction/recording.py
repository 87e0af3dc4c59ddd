"""Work that is done over and over on tensors that stay where they are: recorded once, then launched as a whole.

On a GPU an iteration launches hundreds of small kernels from Python, which takes several times as long as they do.
"""

import logging
from collections.abc import Callable

import torch

logger = logging.getLogger(__name__)

Work = Callable[[], None]
WARM_UP = 2
"""Calls before the record: in them libraries choose their kernels and the optimiser makes its state."""


class Repeated:
    """A function that is called many times, by its record from the third call on.

    The function may read and write only tensors that exist before and after it, and draw random numbers only from
    `generator`. What it does in Python happens in the first calls and while it is recorded. Where the device cannot
    record, or the function does what a record cannot hold, such as reading a value on the host, it is called as usual.
    """

    def __init__(self, function: Work, device: torch.device, generator: torch.Generator) -> None:
        self._function, self._device, self._generator = function, device, generator
        self._calls, self._replay = 0, None
        self._record = recorder_for(device)

    def __call__(self) -> None:
        self._calls += 1
        if self._replay is None and self._record is not None and self._calls > WARM_UP:
            self._replay = self._recorded()
        if self._replay is not None:
            self._replay()
        elif self._record is not None:
            _aside(self._function, self._device)
        else:
            self._function()

    def _recorded(self) -> Work | None:
        state = self._generator.get_state()
        try:
            return self._record(self._function, self._generator)
        except RuntimeError as failure:
            logger.info("iterations are launched kernel by kernel, since they cannot be recorded: %s", failure)
            self._record = None
            self._generator.set_state(state)
            return None


def recorder_for(device: torch.device) -> Callable[[Work, torch.Generator], Work] | None:
    """What makes of a function one that launches all its kernels at once, or None where the device has no such."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    graph_type = getattr(module, "CUDAGraph", None)
    if not hasattr(graph_type, "register_generator_state"):
        return None

    def record(function: Work, generator: torch.Generator) -> Work:
        graph = graph_type()
        graph.register_generator_state(generator)
        with module.device(device), module.graph(graph, capture_error_mode="thread_local"):
            function()
        return graph.replay

    return record


def _aside(function: Work, device: torch.device) -> None:
    """Call the function on a stream of its own, as what is recorded runs on one."""
    module = torch.get_device_module(device)
    before, stream = module.current_stream(), module.Stream()
    stream.wait_stream(before)
    with module.stream(stream):
        function()
    before.wait_stream(stream)
