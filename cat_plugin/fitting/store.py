"""Paired logits between the models and the fit: in memory, or in a temporary folder where they are too many."""

import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cat_plugin.errors import CATError
from cat_plugin.fitting.processes import Processes
from cat_plugin.running.digests import output_keys
from cat_plugin.running.loaders import NoImagesError

logger = logging.getLogger(__name__)

MEMORY_VALUES = 2**25
"""Numbers that are held in memory, an eighth of a gigabyte in float32, before they go to files."""
CHUNK_VALUES = 2**21
"""Numbers that a chunk holds."""


class LogitStore:
    """Logits (N, C) of the quantized and of the full-precision model for the same images.

    Where a row is not an image but a position of one, rows come with the image that they belong to.

    Rows are appended batch by batch and read in chunks or by index, as float64. Beyond `memory_values` numbers they
    are kept in float32 in files of a temporary folder, which `close` deletes, so that memory does not grow with N.
    """

    def __init__(self, memory_values: float = MEMORY_VALUES) -> None:
        self._memory_values = memory_values
        self._parts: list[tuple[Tensor, ...]] = []
        self._keys: list[Tensor] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._images: list[Tensor] = []
        self._length = 0
        self._widths: tuple[int, ...] = ()
        self._dtype = torch.float32

    @classmethod
    def of(cls, q: Tensor, f: Tensor, images: Tensor | None = None, keys: Tensor | None = None) -> "LogitStore":
        """A store in memory of logits (N, C) twice; `images` and `keys` as in `append`."""
        store = cls(memory_values=math.inf)
        store.append(q, f, images, keys)
        return store

    def append(self, q: Tensor, f: Tensor, images: Tensor | None = None, keys: Tensor | None = None) -> None:
        """Adds the logits of a batch, (n, C) twice, on any device.

        Args:
            images: (n,) int64, counted from 0 over all batches, the image of every row, of which those of an image come
                together; None: every row is one.
            keys: (m, 2) float64, what tells the m images of the batch apart, see `output_keys`; None: their rows do.
        """
        parts = tuple(part.detach().cpu() for part in (q, f))
        widths = tuple(part.shape[1] for part in parts)
        if any(len(part) != len(parts[0]) for part in parts) or self._widths not in ((), widths):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise CATError(f"a batch has logits of shapes {shapes}; expected one row an image, always as wide")
        if (images is None) != (not self._images) and self._length:
            raise CATError("some batches have one row an image and others several; expected outputs of one kind")
        if images is not None:
            self._images.append(images.cpu())
        if keys is None:
            keys = output_keys(*(_means(part, images) for part in parts))
        self._keys.append(keys)
        self._widths = widths
        self._dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        self._length += len(q)
        if self._folder is not None:
            self._write(parts)
            return
        self._parts.append(parts)
        if self._length * sum(self._widths) > self._memory_values:
            self._spill()

    def __len__(self) -> int:
        return self._length

    @property
    def images(self) -> Tensor | None:
        """(N,) int64, the image of every row; None where every row is one."""
        return torch.cat(self._images) if self._images else None

    @property
    def num_images(self) -> int:
        """How many images there are."""
        return sum(map(len, self._keys))

    @property
    def classes(self) -> int:
        """C."""
        return self._widths[0]

    @property
    def dtype(self) -> torch.dtype:
        """float64 if the logits of the quantized model came so, else float32."""
        return self._dtype

    def keys(self) -> Tensor:
        """(images, 2) float64, by which images are told apart and put in order, see `output_keys`."""
        return torch.cat(self._keys) if self._keys else torch.empty(0, 2, dtype=torch.float64, device="cpu")

    def rows_per_image(self) -> Tensor:
        """(images,) int64."""
        images = self.images
        if images is None:
            return torch.ones(self._length, dtype=torch.int64, device="cpu")
        return torch.bincount(images, minlength=self.num_images)

    def rows_of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(n,) int64 rows of the given images (m,), in their order, and for each row which of the m it belongs to."""
        counts = self.rows_per_image()
        starts, sizes = (counts.cumsum(0) - counts)[images], counts[images]
        owners = torch.arange(len(images), device=sizes.device).repeat_interleave(sizes)
        within = torch.arange(len(owners), device=sizes.device) - (sizes.cumsum(0) - sizes)[owners]
        return starts[owners] + within, owners

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order, `(q, f)`, as many at a time as memory takes."""
        size = max(CHUNK_VALUES // max(sum(self._widths), 1), 1)
        for start in range(0, self._length, size):
            yield self.take(torch.arange(start, min(start + size, self._length), device="cpu"))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The given rows (n,) int64, `(q, f)` in float64."""
        if self._folder is None:
            if len(self._parts) > 1:
                self._parts = [tuple(torch.cat(part) for part in zip(*self._parts, strict=True))]
            q, f = (part[rows].double() for part in self._parts[0])
        else:
            q, f = (self._read(index, width, rows.numpy()) for index, width in enumerate(self._widths))
        return q, f

    def first(self, images: int) -> "LogitStore":
        """The first images alone, in memory."""
        rows, owners = self.rows_of(torch.arange(images, device="cpu"))
        q, f = (part.to(self.dtype) for part in self.take(rows))
        return LogitStore.of(q, f, None if self.images is None else owners, self.keys()[:images])

    def with_outputs(self, q: Tensor) -> "LogitStore":
        """The same images, in memory, with other outputs (N, C) of the quantized model."""
        f = self.take(torch.arange(len(self), device="cpu"))[1].to(self.dtype)
        return LogitStore.of(q.to(self.dtype), f, self.images, self.keys())

    def match(self, processes: Processes) -> None:
        """Makes sure that the stores of all processes hold outputs of one kind; empty ones take over the others'.

        Raises:
            CATError: there are no outputs, or they are of several kinds.
        """
        mine = (self._widths, self._dtype, bool(self._images)) if len(self) else None
        kinds = {kind for kind in processes.gather(mine) if kind is not None}
        if not kinds:
            raise NoImagesError
        if len(kinds) > 1:
            found = (f"{widths[0]} classes{' a position' * dense} ({dtype})" for widths, dtype, dense in kinds)
            raise CATError(
                f"the processes gave outputs of several kinds: {', '.join(sorted(found))}; expected those of one model"
            )
        if mine is None:
            ((self._widths, self._dtype, dense),) = kinds
            self._parts = [tuple(torch.empty(0, width, dtype=self._dtype, device="cpu") for width in self._widths)]
            self._images = [torch.empty(0, dtype=torch.int64, device="cpu")] if dense else []

    def gathered(self, processes: Processes) -> tuple[Tensor, Tensor, Tensor | None]:
        """All rows of all processes, `(q, f, images)`, logits (N, C) in the dtype of the store."""
        q, f = (processes.gather_rows(part.to(self.dtype)) for part in self.take(torch.arange(len(self), device="cpu")))
        images = self.images
        if images is not None:
            images = processes.gather_rows(images + processes.before(self.num_images))
        return q, f, images

    def close(self) -> None:
        """Forgets everything and deletes the files."""
        self._parts = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def __enter__(self) -> "LogitStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _spill(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="cat-logits-")
        logger.info("more than %s numbers: logits are kept in %s from here on", self._memory_values, self._folder.name)
        for parts in self._parts:
            self._write(parts)
        self._parts = []

    def _path(self, index: int) -> Path:
        return Path(self._folder.name) / f"{index}.float32"

    def _write(self, parts: tuple[Tensor, ...]) -> None:
        for index, part in enumerate(parts):
            with self._path(index).open("ab") as file:
                part.to(torch.float32).contiguous().numpy().tofile(file)

    def _read(self, index: int, width: int, rows: np.ndarray) -> Tensor:
        out = np.empty((len(rows), width), dtype=np.float32)
        with self._path(index).open("rb") as file:
            start = 0
            for end in [*(np.flatnonzero(np.diff(rows) != 1) + 1), len(rows)]:  # runs of neighbours
                if end > start:
                    file.seek(4 * width * int(rows[start]))
                    file.readinto(out[start:end].data.cast("B"))
                start = end
        return torch.from_numpy(out).double()


def different_images(keys: Tensor) -> Tensor:
    """Indices of different images, in the order of their `keys` (N, 2); of those that are alike, one."""
    order, repeats = _sorted(keys)
    return order[~repeats]


def groups_of_alike(keys: Tensor) -> Tensor:
    """(N,) int64, the same for images that are alike by their `keys` (N, 2)."""
    order, repeats = _sorted(keys)
    return torch.empty_like(order).index_copy_(0, order, (~repeats).cumsum(0) - 1)


def _sorted(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The order of images by their `keys` (N, 2), and in this order, (N,) bool: does it repeat the one before?"""
    order = torch.from_numpy(np.lexsort(keys.T.flip(0).numpy()))
    spread = (keys - keys.mean(dim=0)).abs().mean(dim=0)  # what all outputs have in common tells no images apart
    repeats = (keys[order].diff(dim=0).abs() <= 1e-5 * spread).all(dim=1)
    return order, torch.cat([repeats.new_zeros(min(len(keys), 1)), repeats])


def _means(rows: Tensor, images: Tensor | None) -> Tensor:
    """Means of the rows (n, C) of every image of a batch."""
    if images is None:
        return rows
    found, index, sizes = images.unique(return_inverse=True, return_counts=True)
    sums = rows.new_zeros(len(found), rows.shape[1], dtype=torch.float64).index_add_(0, index, rows.double())
    return sums / sizes.unsqueeze(1)
