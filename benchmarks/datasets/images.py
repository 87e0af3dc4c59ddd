"""Images of a data set: a tensor in memory, or files that are decoded when a network needs them.

Both have a length and are indexed alike, `images[rows]`; the functions here do the rest with either.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import pil_loader
from tqdm import tqdm

from benchmarks import BenchmarkError
from benchmarks.runs.files import digest_text
from benchmarks.wording import lasting, reason
from cat_plugin.running.digests import image_digests

FILES_BATCH = 64  # decoded together; 256 of ImageNet's in flight for every worker would be gigabytes
CPU_BATCH = 16
"""For the outputs of layers for more images of 224 pixels, memory is asked from the system every time."""
DIGESTS_KEPT = 200_000
READING_THREADS = 4


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """Image files under `root`, by name; `transform` makes an RGB image a float32 tensor `(C, H, W)`.

    `workers` processes decode them, `at_once` in a batch; with 0, this one does.
    """

    root: Path
    names: tuple[str, ...]
    transform: Callable[[Any], Tensor]
    workers: int = 0
    at_once: int = FILES_BATCH

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, rows: Tensor | slice) -> "ImageFiles":
        """Some of them, in the order of `rows`: indices `(n,)`, or a slice."""
        if isinstance(rows, slice):
            return replace(self, names=self.names[rows])
        return replace(self, names=tuple(self.names[row] for row in rows.tolist()))

    def digests(self) -> list[str]:
        """One a file, of its bytes: reading is enough, nothing is decoded."""
        with ThreadPoolExecutor(READING_THREADS) as threads:
            return list(threads.map(_file_digest, [self.root / name for name in self.names]))

    def listing(self) -> str:
        """Changes with names and sizes of the files, and with what the transform makes of the first one."""
        with ThreadPoolExecutor(READING_THREADS) as threads:
            sizes = threads.map(_file_size, [self.root / name for name in self.names])
            listed = [f"{name}:{size}" for name, size in zip(self.names, sizes, strict=True)]
        return digest_text(lasting(self.transform), *image_digests(self.first()), *listed)

    def first(self) -> Tensor:
        """The first image `(1, C, H, W)`, as the transform makes it.

        Raises:
            BenchmarkError: it cannot be read, or the transform, which may be the user's, makes no such tensor of it.
        """
        try:
            found = _Decoded(self)[0]
        except Exception as error:
            raise BenchmarkError(
                f"the transform fails on {self.root / self.names[0]}: {type(error).__name__}: {reason(error)}"
            ) from error
        if isinstance(found, BenchmarkError):
            raise found
        if not isinstance(found, Tensor) or found.ndim != 3 or found.dtype != torch.float32:
            kind = f"{tuple(found.shape)} {found.dtype}" if isinstance(found, Tensor) else type(found).__name__
            raise BenchmarkError(f"the transform makes {kind} of an image; expected a float32 tensor (channels, H, W)")
        return found[None]


Images = Tensor | ImageFiles


def digests(images: Images) -> list[str]:
    """What tells images apart: of a tensor `(N, ...)` the float32 values of each, of files the bytes of each."""
    return images.digests() if isinstance(images, ImageFiles) else image_digests(images)


def shown(images: Images, row: int) -> str:
    """How a message calls the image in this row."""
    return f"{row} ({images.root / images.names[row]})" if isinstance(images, ImageFiles) else str(row)


def batches(images: Images, title: str | None = None) -> Tensor | Iterable[Tensor]:
    """What `cat_plugin.running.collect.collect_outputs` takes: a tensor as it is, files as batches `(n, C, H, W)`.

    `title` is that of a progress bar; None: there is none.

    Raises:
        BenchmarkError: while batches are drawn, for a file that cannot be read as an image.
    """
    return _FileBatches(images, title) if isinstance(images, ImageFiles) else images


def stacked(images: Images, title: str | None = None) -> Tensor:
    """All in one tensor `(N, C, H, W)`.

    Raises:
        BenchmarkError: a file cannot be read as an image.
    """
    return torch.cat(list(_FileBatches(images, title))) if isinstance(images, ImageFiles) else images


@dataclass(frozen=True)
class _FileBatches:
    images: ImageFiles
    title: str | None

    def __len__(self) -> int:
        return -(-len(self.images) // self.images.at_once)

    def __iter__(self) -> Iterator[Tensor]:
        loader = DataLoader(
            _Decoded(self.images),
            self.images.at_once,
            num_workers=min(self.images.workers, len(self)),
            collate_fn=_collate,
            generator=torch.Generator().manual_seed(0),  # else a loader draws from the global one
        )
        drawn = _from_workers(loader) if loader.num_workers else loader
        for batch in tqdm(drawn, self.title, len(self), unit="batch", leave=False, disable=self.title is None):
            # From a worker an exception would come with its traceback in the message.
            if isinstance(batch, BenchmarkError):
                raise batch
            yield batch


def _from_workers(loader: DataLoader) -> Iterator[Tensor | BenchmarkError]:
    """Batches of a loader; what happens to its processes is an error that says what to do."""
    try:
        yield from loader
    except (RuntimeError, OSError) as error:
        if reason(error).startswith("Caught "):  # and brought here from a worker: a mistake in the code
            raise
        raise BenchmarkError(
            f"the {loader.num_workers} processes that decode images failed ({reason(error)}); decode without them by "
            "--workers 0, or give them more shared memory (of a container: --shm-size 8g) and open files (ulimit -n)"
        ) from error


@dataclass(frozen=True)
class _Decoded:
    """A map-style data set; what cannot be decoded is an error, given rather than raised."""

    images: ImageFiles

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> Tensor | BenchmarkError:
        path = self.images.root / self.images.names[row]
        try:
            return self.images.transform(pil_loader(str(path)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return BenchmarkError(f"{path} cannot be read as an image: {error}; replace the file, or take it out")


def _collate(decoded: Sequence[Tensor | BenchmarkError]) -> Tensor | BenchmarkError:
    errors = [each for each in decoded if isinstance(each, BenchmarkError)]
    return errors[0] if errors else torch.stack(list(decoded))


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from error


def _file_digest(path: Path) -> str:
    try:
        found = path.stat()
        return _digest_of(path, found.st_size, found.st_mtime_ns)
    except OSError as error:
        raise BenchmarkError(f"{path} cannot be read: {error}") from error


@lru_cache(maxsize=DIGESTS_KEPT)
def _digest_of(path: Path, size: int, changed: int) -> str:
    """SHA-256 of the bytes; kept while size and time of change stay as they are."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
