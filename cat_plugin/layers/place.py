"""Where corrections go: the layers that have weights, the axis of their channels, and whether gradients reach them."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from cat_plugin.errors import CATError
from cat_plugin.fitting.processes import Processes
from cat_plugin.running.models import inside
from cat_plugin.running.outputs import first_tensor
from cat_plugin.running.positions import class_axis_of
from cat_plugin.running.taps import find_layers, is_in_compiled
from cat_plugin.running.weights import is_layer, is_packed, weights_of

SMALLEST_SPREAD = 0.01
"""Of a channel, as a share of the mean spread of the layer's channels."""


@dataclasses.dataclass(frozen=True, eq=False)
class Place:
    """A layer whose output can be corrected.

    axis: that of the channels, counted from the last; spread: (C,) float32 standard deviation of each over images and
    positions, the unit of offsets, on the CPU; numbers: how many numbers it gives for an image.
    """

    name: str
    axis: int
    spread: Tensor
    numbers: int

    @property
    def channels(self) -> int:
        return len(self.spread)


def candidates(model: nn.Module, wanted: str | Sequence[str]) -> dict[str, nn.Module]:
    """The layers of `model` that have weights, by name, or those of the names that are `wanted`.

    Embeddings and recurrent layers give no channels of a product of their input with weights, and are left out.

    Raises:
        CATError: a name is none of a layer, or of one that is compiled.
    """
    if not isinstance(wanted, str):
        named = find_layers(model, wanted)
        scripted = [name for name, module in named.items() if isinstance(module, torch.jit.RecursiveScriptModule)]
        if scripted:
            raise CATError(f"layer {scripted[0]!r} is TorchScript, which takes no hooks; name layers that are not")
        return named
    modules = dict(model.named_modules(remove_duplicate=False))
    network, prefix = inside(model)
    found = {prefix + name: module for name, module in network.named_modules() if _multiplies(module)}
    return {name: module for name, module in found.items() if name and not is_in_compiled(modules, name)}


def _multiplies(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase) or "embedding" in type(module).__name__.lower():
        return False
    return is_layer(module) and not isinstance(module, torch.jit.ScriptModule)


class Measure:
    """Forward hook that takes the measure of what a layer gives: its channels and their spread."""

    def __init__(self, module: nn.Module) -> None:
        self.axes = _spatial_axes(module)
        self.axis: int | None = None
        self.shapes: set[tuple[int, int]] = set()
        self.sums: Tensor | None = None
        self.numbers = 0

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        values = first_tensor(output)
        if values is not None and values.is_nested:  # of a transformer with padding
            self.numbers = max(self.numbers, *(part.numel() for part in values.unbind()))
            values = torch.cat(values.unbind())
        if values is None or values.ndim < 2:
            self.shapes.add((-1, 0))
            return
        axes = values.ndim - 1 - class_axis_of(values) if self.axes is None else self.axes
        axis = -1 - min(axes, values.ndim - 2)
        channels = values.shape[axis]
        self.shapes.add((axis, channels))
        self.axis = axis
        self.numbers = max(self.numbers, values[0].numel())
        sums = sums_of(values.detach().movedim(axis, -1).reshape(-1, channels)).cpu()
        if self.sums is None or self.sums.shape == sums.shape:
            self.sums = sums if self.sums is None else self.sums + sums

    @property
    def found(self) -> tuple[int, int, int] | None:
        """Axis, channels, and numbers an image; None for a layer that did not run, or not always alike."""
        if len(self.shapes) != 1 or self.sums is None or not self.sums.isfinite().all():
            return None
        return self.axis, self.sums.shape[1], self.numbers


def _spatial_axes(module: nn.Module) -> int | None:
    """How many axes follow that of the channels: as many as those of the weights beyond inputs and outputs.

    None where there are no such weights, as of blocks: by the shape of what they give, then.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return len(module.kernel_size)
    if isinstance(module, nn.Linear):
        return 0
    return max((weight.ndim - 2 for weight in weights_of(module)), default=0 if is_packed(module) else None)


@contextmanager
def measuring(layers: dict[str, nn.Module]) -> Iterator[dict[str, Measure]]:
    """A `Measure` on each of `layers` inside the block."""
    measures = {name: Measure(module) for name, module in layers.items()}
    with ExitStack() as stack:
        for name, measure in measures.items():
            stack.callback(layers[name].register_forward_hook(measure).remove)
        yield measures


def places(measures: dict[str, Measure], processes: Processes) -> list[Place]:
    """Those of layers that ran, the same in all processes."""
    mine = {name: measure.found for name, measure in measures.items() if measure.found is not None}
    found = next((each for each in processes.gather(mine) if each), {})
    made = []
    for name, (axis, channels, numbers) in found.items():
        sums = measures[name].sums
        sums = torch.zeros(3, channels, dtype=torch.float64, device="cpu") if sums is None else sums
        spread = spread_of(processes.sum(sums))
        smallest = SMALLEST_SPREAD * spread.mean().item()
        if smallest > 0 and math.isfinite(smallest):
            made.append(Place(name, axis, spread.clamp(min=smallest).float(), numbers))
    return made


def sums_of(rows: Tensor) -> Tensor:
    """(3, C) float64: how many `rows` (n, C) there are, their sums, and those of their squares."""
    rows = rows.double()
    return torch.stack([torch.ones_like(rows).sum(dim=0), rows.sum(dim=0), rows.square().sum(dim=0)])


def spread_of(sums: Tensor) -> Tensor:
    """(C,) standard deviations, of the `sums_of` rows."""
    count, total, squares = sums
    return (squares / count - (total / count).square()).clamp(min=0).sqrt()


def check_named(wanted: str | Sequence[str], places: Sequence[Place]) -> None:
    """Raises a `CATError` if a layer that was asked for by name cannot be corrected."""
    known = {place.name for place in places}
    missing = [] if isinstance(wanted, str) else [name for name in wanted if name not in known]
    if missing:
        raise CATError(
            f"layer {missing[0]!r} gives no floating-point tensor with channels, always of one kind; "
            "name layers that do"
        )
