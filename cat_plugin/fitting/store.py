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
    def of(cls, q: Tensor, f: Tensor, images: Tensor | None = None) -> "LogitStore":
        """A store in memory of logits (N, C) twice; `images` as in `append`."""
        store = cls(memory_values=math.inf)
        store.append(q, f, images)
        return store

    def append(self, q: Tensor, f: Tensor, images: Tensor | None = None) -> None:
        """Adds the logits of a batch, (n, C) twice, on any device.

        images: (n,) int64, counted from 0 over all batches, the image of every row; None: every row is one.
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
        mixture = torch.randn(widths[0], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self._keys.append(torch.stack([(part.double() * mixture).sum(1) for part in parts], 1))
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
        images = self.images
        if images is None:
            return self._length
        return int(images.max()) + 1 if len(images) else 0

    @property
    def classes(self) -> int:
        """C."""
        return self._widths[0]

    @property
    def dtype(self) -> torch.dtype:
        """float64 if the logits of the quantized model came so, else float32."""
        return self._dtype

    def keys(self) -> Tensor:
        """(N, 2) float64: a mixture of the logits of each model, by which images are told apart and put in order."""
        return torch.cat(self._keys) if self._keys else torch.empty(0, 2, dtype=torch.float64)

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All rows in order, `(q, f)`, as many at a time as memory takes."""
        size = max(CHUNK_VALUES // max(sum(self._widths), 1), 1)
        for start in range(0, self._length, size):
            yield self.take(torch.arange(start, min(start + size, self._length)))

    def take(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The given rows (n,) int64, `(q, f)` in float64."""
        if self._folder is None:
            if len(self._parts) > 1:
                self._parts = [tuple(torch.cat(part) for part in zip(*self._parts, strict=True))]
            q, f = (part[rows].double() for part in self._parts[0])
        else:
            q, f = (self._read(index, width, rows.numpy()) for index, width in enumerate(self._widths))
        return q, f

    def gathered(self, processes: Processes) -> tuple[Tensor, Tensor, Tensor | None]:
        """All rows of all processes, `(q, f, images)`, logits (N, C) in the dtype of the store."""
        q, f = (processes.gather_rows(part.to(self.dtype)) for part in self.take(torch.arange(len(self))))
        images = self.images
        if images is not None:
            images = processes.gather_rows(images + processes.rows_before(self.num_images))
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
