"""Calibration data of units, kept between passes, and how much that is."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baselines.network.trace import Trace
from baselines.network.units import Unit
from baselines.quantization.operations import axes_by_memory
from baselines.recipes import Recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class CachePlan:
    """Where calibration data are kept between the passes.

    Attributes:
        device: of what is kept.
        dtype: of floating-point values that are kept; `None` keeps them as they were computed.
        compute_device: of the networks, and of the batches that they get.
    """

    device: torch.device
    dtype: torch.dtype | None
    compute_device: torch.device


class Cached:
    """Calibration data (N, ...), kept as the plan says and read in batches, as they were computed.

    Attributes:
        tensor: all of it, as it is kept.
        dtype: as it was computed.
    """

    def __init__(self, tensor: Tensor, plan: CachePlan, dtype: torch.dtype | None = None) -> None:
        self.tensor, self.plan = tensor, plan
        self.dtype = dtype or tensor.dtype
        # Axes in the order of memory, where the values of an image are neighbours: it is copied as one piece.
        order = axes_by_memory(tensor, 1)
        by_memory = tensor.permute(0, *order)
        self._rows, self._row_shape = by_memory.reshape(len(tensor), -1), by_memory.shape[1:]
        self._axes = [0, *(1 + order.index(axis) for axis in range(1, tensor.dim()))]

    @classmethod
    def collect(cls, parts: Iterable[Tensor], count: int, plan: CachePlan) -> "Cached | None":
        """Keep the consecutive `parts` of data of `count` images, without a second copy of the
        whole; None where there is no part.

        Raises:
            OverflowError: the plan's type cannot hold a value.
        """
        kept: Cached | None = None
        filled = 0
        for part in parts:
            if kept is None:
                dtype = plan.dtype if plan.dtype is not None and part.is_floating_point() else part.dtype
                kept = cls(_empty_like(part, count, dtype, plan.device), plan, part.dtype)
            kept.tensor[filled : filled + len(part)] = part
            filled += len(part)
        if plan.dtype == torch.float16 and kept is not None and kept.tensor.isinf().any():
            raise OverflowError(f"activations beyond {torch.finfo(plan.dtype).max:.0f} do not fit a cache of float16")
        return kept

    def __len__(self) -> int:
        return len(self.tensor)

    def rows(self, chosen: Tensor) -> Tensor:
        """The images with these indices, in their order; a copy."""
        rows = self._rows.index_select(0, chosen.to(self.plan.device)).view(-1, *self._row_shape).permute(self._axes)
        return rows.to(self.plan.compute_device, self.dtype)

    def batches(self, size: int) -> Iterator[Tensor]:
        """All images, `size` at a time; copies."""
        return (self.batch(start, size) for start in range(0, len(self), size))

    def even_batches(self, size: int) -> Iterator[Tensor]:
        """All images in as many batches, but none of them smaller than another by more than one image; copies."""
        count = -(-len(self) // size)
        starts = [index * len(self) // count for index in range(count + 1)]
        return (self.batch(start, end - start) for start, end in itertools.pairwise(starts))

    def batch(self, start: int, size: int) -> Tensor:
        """At most `size` images from `start`; a copy."""
        return self.tensor[start : start + size].to(self.plan.compute_device, self.dtype, copy=True)

    @torch.no_grad()
    def mapped(self, function: Callable[[Tensor], Tensor], batch_size: int) -> "Cached":
        """What `function` makes of the data."""
        return Cached.collect(map(function, self.batches(batch_size)), len(self), self.plan)


def _empty_like(part: Tensor, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for `count` images like those of `part`, with the axes in the same order in memory."""
    order = axes_by_memory(part, 1)
    room = torch.empty(count, *(part.shape[axis] for axis in order), dtype=dtype, device=device)
    return room.permute(0, *(1 + order.index(axis) for axis in range(1, part.dim())))


def log_cache_size(units: Iterable[Unit], record: Trace, count: int, plan: CachePlan, recipe: Recipe) -> int:
    """Log, and return, how many bytes the data of `count` images take at most during a walk through `units`.

    `record` is of the FP twin. While a unit is worked on, there are its inputs in both networks and its output in
    one, before and behind the activation; then the outputs in both, with an input of this unit or of the next. Where
    units are layers of a block, the block's inputs and the outputs of the layers before are there as well. Corrected
    inputs come beside what they were and with outputs of their own, weights of errors beside the outputs.
    """
    corrected, weighted = recipe.correction is not None, recipe.error_weighting != "none"
    most, before, held = 0, 0, dict[str | None, int]()
    sizes: dict[str, tuple[int, int]] = {}
    for unit in units:
        if unit.block is not None and unit.block not in held:
            held[unit.block] = 2 * _bytes(record, unit.block, count, plan)[0]
        size_in, size_out = sizes[unit.name] = _bytes(record, unit.name, count, plan)
        working = (2 + corrected) * size_in + (1 + bool(unit.activation) + corrected + weighted) * size_out
        passing = max(size_in + 2 * size_out, 2 * before + size_in, before + 2 * size_in)
        most = max(most, held.get(unit.block, 0) + max(working, passing))
        before = size_out
        if unit.block is not None:
            held[unit.block] += 2 * size_out
    if sizes:
        largest = max(sizes, key=lambda name: max(sizes[name]))
        logger.info(
            "calibration cache: up to %s on %s for %d images; the largest unit is %s, input %s and output %s",
            *(_readable(most), plan.device, count, largest, *map(_readable, sizes[largest])),
        )
    return most


def _bytes(record: Trace, name: str, count: int, plan: CachePlan) -> tuple[int, int]:
    """Of input and output of a module, for `count` images."""
    call, images = record.of(name)[0], len(record.of("")[0].inputs[0].tensor)
    tensors = call.inputs[0].tensor, call.output.tensor
    types = [plan.dtype if plan.dtype and tensor.is_floating_point() else tensor.dtype for tensor in tensors]
    return tuple(
        tensor.numel() // images * count * dtype.itemsize for tensor, dtype in zip(tensors, types, strict=True)
    )


def _readable(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
