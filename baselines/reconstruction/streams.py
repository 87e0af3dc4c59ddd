"""What goes into each unit, on calibration images, carried forward one unit at a time."""

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from baselines.network.trace import Arguments
from baselines.network.units import Unit
from baselines.quantization.quantizers import bypassed
from baselines.reconstruction.cache import Cached

logger = logging.getLogger(__name__)


class _Arrived(Exception):
    """Carries a unit's input out of the forward pass that reached it."""


class Stream:
    """One network's calibration data on its way through the units.

    `arrive` gives the input of the next unit, `leave` computes that unit's output, once. Between two units
    the network's own forward pass is replayed with the last unit's output in its place, so that whatever it computes
    there (pooling, flattening, adding tokens) happens as always, while no unit runs a second time. Layers that are
    units inside of a block are walked the same way in the block's own forward pass.
    """

    def __init__(self, network: nn.Module, inputs: Cached, batch_size: int) -> None:
        self._network = network
        self._outer = _Level(network, inputs, batch_size)
        self._block: str | None = None
        self._inner: _Level | None = None

    @torch.no_grad()
    def arrive(self, unit: Unit) -> Cached:
        """The input (N, ...) of `unit`, the next one in calling order, before its own quantization."""
        if unit.block != self._block:
            self._change_block(unit)
        module = self._network.get_submodule(unit.name)
        return (self._inner or self._outer).arrive(module, unit.name, unit.arguments)

    @torch.no_grad()
    def leave(self, unit: Unit, arrived: Cached) -> Cached:
        """The output (N, ...) of `unit` for the input that `arrive` gave."""
        module = self._network.get_submodule(unit.name)
        return (self._inner or self._outer).leave(module, unit.arguments, arrived)

    def _change_block(self, unit: Unit) -> None:
        if self._inner is not None:
            self._outer.passed(self._network.get_submodule(self._block), self._inner.finish())
        self._block, self._inner = unit.block, None
        if unit.block is not None:
            module = self._network.get_submodule(unit.block)
            arrived = self._outer.arrive(module, unit.block, unit.block_arguments)
            self._inner = self._outer.within(unit.block_arguments.of(module), arrived)


class _Level:
    """A network, or a block, whose units are passed one after the other.

    With `keep_all`, a replay has the outputs of all units passed so far, as a shortcut in a block needs them.
    Otherwise it has that of the last one, and units further back return NaN: if that reaches the next unit, the
    network has a connection past a unit, and the units are run again for this step.
    """

    def __init__(
        self, network: Callable[[Tensor], object], inputs: Cached, batch_size: int, keep_all: bool = False
    ) -> None:
        self._network = network
        self._inputs = inputs
        self._batch_size = batch_size
        self._keep_all = keep_all
        # Shape and type are those of the output for one of the inputs.
        self._passed: list[tuple[nn.Module, torch.Size, torch.dtype, Cached | None]] = []

    def within(self, block: Callable[[Tensor], object], inputs: Cached) -> "_Level":
        """The level of the units inside of `block`."""
        return _Level(block, inputs, self._batch_size, keep_all=True)

    def arrive(self, unit: nn.Module, name: str, arguments: Arguments) -> Cached:
        arrived = self._collect(unit, name, arguments, self._replayed)
        if arrived.tensor.is_floating_point() and torch.isnan(arrived.tensor).any() and len(self._passed) > 1:
            logger.debug("a connection passes a unit before %s: running all units up to it", type(unit).__name__)
            arrived = self._collect(unit, name, arguments, lambda start: contextlib.nullcontext())
        if not self._keep_all and self._passed:
            self._passed[-1] = *self._passed[-1][:3], None
        return arrived

    def leave(self, unit: nn.Module, arguments: Arguments, arrived: Cached) -> Cached:
        output = arrived.mapped(arguments.of(unit), self._batch_size)
        self.passed(unit, output)
        return output

    def passed(self, unit: nn.Module, output: Cached) -> None:
        """Go on behind `unit`, whose output is known."""
        rows = len(output) // len(self._inputs)
        self._passed.append((unit, torch.Size((rows, *output.tensor.shape[1:])), output.dtype, output))

    def finish(self) -> Cached:
        """The output (N, ...) of the whole level, all of whose units have been passed."""
        return self._cached(self._run(start) for start in self._starts())

    def _run(self, start: int) -> Tensor:
        with self._replayed(start):
            return self._network(self._inputs.batch(start, self._batch_size))

    def _starts(self) -> range:
        return range(0, len(self._inputs), self._batch_size)

    def _cached(self, parts: Iterable[Tensor]) -> Cached | None:
        """Keep what goes through the level: a row for each of its inputs, or several (windows, tokens)."""
        parts = iter(parts)
        first = next(parts, None)
        if first is None:
            return None
        rows = len(first) // min(self._batch_size, len(self._inputs))
        return Cached.collect(itertools.chain([first], parts), rows * len(self._inputs), self._inputs.plan)

    def _collect(
        self,
        unit: nn.Module,
        name: str,
        arguments: Arguments,
        replay: Callable[[int], contextlib.AbstractContextManager],
    ) -> Cached:
        reached: list[int] = []
        with forward_replaced(unit, _raising_arrived(unit, name, arguments)), _without_entry_quantizer(unit):
            collected = self._cached(self._inputs_of_unit(replay, reached))
        if len(reached) != len(self._starts()):
            raise ValueError(
                f"{name} ({type(unit).__name__}) was reached by {len(reached)} of {len(self._starts())} calibration "
                "batches: control flow that depends on data hides it; let every image take the same path, or quantize "
                "the paths as networks of their own"
            )
        return collected

    def _inputs_of_unit(
        self, replay: Callable[[int], contextlib.AbstractContextManager], reached: list[int]
    ) -> Iterator[Tensor]:
        for start in self._starts():
            with replay(start):
                try:
                    self._network(self._inputs.batch(start, self._batch_size))
                except _Arrived as stop:
                    reached.append(start)
                    yield stop.args[0]

    @contextlib.contextmanager
    def _replayed(self, start: int) -> Iterator[None]:
        size = min(self._batch_size, len(self._inputs) - start)
        with contextlib.ExitStack() as stack:
            for unit, (rows, *shape), dtype, output in self._passed:
                if output is None:
                    give = _nans((size * rows, *shape), dtype, self._inputs.plan.compute_device)
                else:
                    give = returning(output.batch(start * rows, size * rows))
                stack.enter_context(forward_replaced(unit, give))
                stack.enter_context(_without_entry_quantizer(unit))
            yield


def _raising_arrived(unit: nn.Module, name: str, arguments: Arguments) -> Callable[..., None]:
    def forward(*args: object, **kwargs: object) -> None:
        x = arguments.tensor_of(args, kwargs)
        if x is None:
            raise ValueError(
                f"{name} ({type(unit).__name__}) is called with other arguments for some calibration images than for "
                "the first ones: let them be the same for all images, or give blocks= without it"
            )
        raise _Arrived(x)

    return forward


def _nans(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Callable[..., Tensor]:
    """Made when they are asked for, so that those of all units are not there at once."""
    return lambda *args, **kwargs: torch.full(shape, torch.nan, dtype=dtype, device=device)


def returning(value: Tensor) -> Callable[..., Tensor]:
    return lambda *args, **kwargs: value


@contextlib.contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    own = vars(module).get("forward")  # a user may have set one on this very module
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _without_entry_quantizer(module: nn.Module) -> contextlib.AbstractContextManager:
    quantizer = getattr(module, "input_quantizer", None)
    return bypassed([] if quantizer is None else [quantizer])
