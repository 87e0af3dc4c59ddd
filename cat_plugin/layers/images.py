"""The calibration images, kept so that they can be run again, some at a time, in another order."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cat_plugin.errors import CATError
from cat_plugin.running.collect import Inputs
from cat_plugin.running.positions import Drawn

logger = logging.getLogger(__name__)

MOST_BYTES = 2**32
"""Of images that are kept; later ones are not used for the layers."""


class KeptImages:
    """Copies of model inputs on the CPU, with the positions of their outputs that count.

    An image is run alone or with any others where inputs are tensors of one shape. Where a `forward_fn` takes the
    batches apart, or shapes differ, those of a batch stay together: they are a group.
    """

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most_bytes = most_bytes
        self._batches: list[tuple[Any, Drawn]] = []
        self._bytes = 0
        self.full = False

    def append(self, inputs: Inputs) -> None:
        """Keeps a batch, unless there are too many already."""
        if self.full or not inputs.drawn.shape[0]:
            return
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(inputs.batch))
        if self._bytes > self._most_bytes:
            self._stop("more do not fit in memory")
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                copied = _copied(inputs.batch)
        except Exception:  # batches of a forward_fn may hold anything
            self._stop("a batch cannot be copied")
            logger.debug("why it cannot", exc_info=True)
            return
        index = inputs.drawn.index
        drawn = dataclasses.replace(inputs.drawn, index=None if index is None else index.clone())
        self._batches.append((copied, drawn))

    def _stop(self, why: str) -> None:
        logger.warning("layers are corrected by the first %d images only: %s", len(self), why)
        self.full = True

    def __len__(self) -> int:
        """How many images are kept: the first ones that came."""
        return sum(drawn.shape[0] for _, drawn in self._batches)

    @property
    def _single(self) -> bool:
        """Whether images can be run in any company."""
        each = ((batch, drawn.shape[0]) for batch, drawn in self._batches)
        if not all(isinstance(batch, Tensor) and batch.ndim and len(batch) == images for batch, images in each):
            return False  # also where a tensor is a bag, with one output, or one of its entries has several
        return len({(batch.shape[1:], batch.dtype) for batch, _ in self._batches}) <= 1

    def groups(self) -> Tensor:
        """(images,) int64: those with one number are run together."""
        if self._single:
            return torch.arange(len(self), device="cpu")
        sizes = torch.tensor([drawn.shape[0] for _, drawn in self._batches], dtype=torch.int64, device="cpu")
        return torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)

    def parts(
        self, images: Tensor, count: int | None = None, generator: torch.Generator | None = None, size: int = 64
    ) -> Iterator["Part"]:
        """The given images (n,) int64, all of a group or none, in `count` parts, some of them empty if need be, or in
        parts of up to `size`; in random order with a `generator`."""
        order = self.groups()[images].unique()
        if generator is not None:
            order = order[torch.randperm(len(order), generator=generator, device="cpu")]
        if self._single:
            chunks = order.tensor_split(count) if count else order.split(size) if len(order) else ()
            for chosen in chunks:
                yield self._take(chosen)
            return
        starts = [0]
        for _, drawn in self._batches:
            starts.append(starts[-1] + drawn.shape[0])
        wanted = torch.zeros(len(self), dtype=torch.bool, device="cpu").index_fill_(0, images, True)
        # As many batches in turn as there are parts.
        chosen = order.tolist()
        if count:
            chosen = [chosen[index] if index < len(chosen) else None for index in range(count)]
        for index in chosen:
            if index is None:
                yield Part.empty()
                continue
            batch, drawn = self._batches[index]
            inside = wanted[starts[index] : starts[index + 1]].nonzero().squeeze(1)
            yield Part(batch, drawn, starts[index] + inside, inside)

    def _take(self, images: Tensor) -> "Part":
        if not len(images):
            return Part.empty()
        self._join()
        return Part(*_subset(*self._batches[0], images), images)

    def _join(self) -> None:
        """Makes one batch of all, once."""
        if len(self._batches) == 1:
            return
        first = self._batches[0][1]
        batch, index, total = torch.cat([batch for batch, _ in self._batches]), None, len(self)
        if first.index is not None:
            parts, before = [], 0
            for _, drawn in self._batches:
                parts.append(drawn.index + before * first.positions)
                before += drawn.shape[0]
            index = torch.cat(parts)
        shape = torch.Size([total, *first.shape[1:]])
        self._batches = [(batch, Drawn(shape, first.class_axis, index, first.binary))]


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Some images, to be run together.

    batch: what a model is given, None for no images; drawn: the positions of its outputs; images: (n,) int64 those that
    count of them; inside: (n,) int64 where these are among all, None: they are all.
    """

    batch: Any
    drawn: Drawn | None
    images: Tensor
    inside: Tensor | None = None

    @classmethod
    def empty(cls) -> "Part":
        """No images."""
        return cls(None, None, torch.empty(0, dtype=torch.int64, device="cpu"))

    @property
    def plain(self) -> bool:
        """Whether the batch is one tensor, and all outputs for it count."""
        return isinstance(self.batch, Tensor) and self.inside is None and self.drawn.index is None

    def rows(self, logits: Tensor) -> Tensor:
        """The rows of `logits`, what a model gives for the batch, of the images that count, those of one together."""
        rows = self.drawn.rows(logits)
        if self.inside is None or len(self.inside) == self.drawn.shape[0]:
            return rows
        each = rows.reshape(self.drawn.shape[0], -1, rows.shape[-1])
        return each[self.inside.to(rows.device)].flatten(0, 1)

    def seen(self, augment: Callable[[Tensor], Tensor]) -> "Part":
        """Another view of the same images."""
        return dataclasses.replace(self, batch=augment(self.batch))

    def split(self, size: int) -> Iterator["Part"]:
        """Parts of up to `size` images, where they need not stay together."""
        if self.inside is not None or len(self.images) <= size:
            yield self
            return
        for index in torch.arange(len(self.images), device="cpu").split(size):
            yield Part(*_subset(self.batch, self.drawn, index), self.images[index])


def _subset(batch: Tensor, drawn: Drawn, images: Tensor) -> tuple[Tensor, Drawn]:
    """Some images of a batch, with the positions that were drawn of each."""
    index = drawn.index
    if index is not None:
        each = index.reshape(drawn.shape[0], -1)[images]
        moved = torch.arange(len(images), device="cpu") - images
        index = (each + drawn.positions * moved.unsqueeze(1)).flatten()
    shape = torch.Size([len(images), *drawn.shape[1:]])
    return batch[images], dataclasses.replace(drawn, shape=shape, index=index)


def flipped(images: Tensor) -> Tensor:
    """Images (n, ..., W), half of which, drawn from the global random state, are mirrored.

    Raises:
        CATError: a batch of something else.
    """
    if not isinstance(images, Tensor) or images.ndim < 3:
        what = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise CATError(
            f'augment="flip" mirrors batches that are one tensor of images, got {what}; give a function of a batch'
        )
    mirrored = torch.rand(len(images), device="cpu").to(images.device) < 0.5
    return torch.where(mirrored.view(-1, *[1] * (images.ndim - 1)), images.flip(-1), images)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for part in batch.values():
            yield from _tensors(part)
    elif isinstance(batch, Sequence) and not isinstance(batch, str):
        for part in batch:
            yield from _tensors(part)


def _copied(batch: Any) -> Any:
    """A copy, which no loader overwrites, with tensors on the CPU."""
    if isinstance(batch, Tensor):
        return batch.detach().to("cpu", copy=True)
    if type(batch) in (list, tuple):
        return type(batch)(map(_copied, batch))
    return {key: _copied(part) for key, part in batch.items()} if type(batch) is dict else copy.deepcopy(batch)
