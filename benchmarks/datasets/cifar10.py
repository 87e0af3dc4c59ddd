"""CIFAR-10 as normalised tensors in memory: from a folder, from a zip archive, or downloaded."""

import lzma
import tempfile
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10 as TorchvisionCIFAR10
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import pil_loader
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from benchmarks import BenchmarkError
from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.description import Description

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR10_SIZE = 32
# The constants that the networks were trained with, ImageNet's by tradition.
CIFAR10_MEAN = (0.485, 0.456, 0.406)
CIFAR10_STD = (0.229, 0.224, 0.225)
DECODING_THREADS = 4


def load_cifar10(source: Path | None, cache: Path, *, download: bool = True, progress: bool = False) -> Dataset:
    """CIFAR-10 from a folder or a zip archive with `train/<class>/*` and `test/<class>/*`.

    Args:
        source: the folder or archive; None downloads the original data through torchvision.
        cache: where a download is kept. An archive is extracted to a temporary folder and leaves nothing behind.
        download: False takes a download that is in `cache` and makes none.
        progress: show progress bars.

    Raises:
        BenchmarkError: no such file, an archive that cannot be read, a missing or empty part, other classes, images
            that cannot be read or are not 32x32, or a download that failed or is not there.
    """
    if source is None:
        return _download_cifar10(cache / "cifar10", download)
    if source.is_dir():
        return _read_cifar10(source, progress)
    if not source.is_file():
        raise BenchmarkError(f"no such file or folder: {source}")
    with tempfile.TemporaryDirectory(prefix="cat-plugin-") as extracted:
        _extract(source, Path(extracted))
        return _read_cifar10(Path(extracted), progress, shown=source)


def _extract(archive: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(archive) as opened:
            opened.extractall(folder)  # inside of it, wherever the names of entries point, and links as plain files
    except (zipfile.BadZipFile, RuntimeError, zlib.error, lzma.LZMAError, EOFError, OSError) as error:
        # OSError: a full disk, or an entry that is a file and a folder. EOFError comes without a message.
        raise BenchmarkError(f"{archive} cannot be read as a zip archive: {str(error) or 'it is cut off'}") from error


def _cifar10(train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> Dataset:
    """The data set from pixels `(N, 3, 32, 32)` uint8 and labels of both parts."""
    return Dataset(
        name=CIFAR10.name,
        train_images=normalize(train[0].float() / 255, CIFAR10_MEAN, CIFAR10_STD),
        train_labels=train[1],
        test_images=normalize(test[0].float() / 255, CIFAR10_MEAN, CIFAR10_STD),
        test_labels=test[1],
        classes=CIFAR10_CLASSES,
    )


def _download_cifar10(root: Path, download: bool) -> Dataset:
    try:
        parts = [TorchvisionCIFAR10(str(root), train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:
        if not download:
            raise BenchmarkError(
                f"{root} holds no CIFAR-10, and several processes cannot download it at once; run one process first, "
                "or give a folder or zip archive in ImageFolder layout by --data"
            ) from error
        raise BenchmarkError(
            f"CIFAR-10 could not be downloaded ({error}); give a folder or zip archive in ImageFolder layout by --data"
        ) from error
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2) for part in parts]
    labels = [torch.tensor(part.targets) for part in parts]
    return _cifar10((pixels[0], labels[0]), (pixels[1], labels[1]))


def _read_cifar10(root: Path, progress: bool, shown: Path | None = None) -> Dataset:
    """Both parts of the data set; `shown` is the name of it that the user knows."""
    shown = shown or root
    folders = [entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith((".", "__"))]
    if len(folders) == 1 and folders[0].name not in ("train", "test"):
        root = folders[0]  # an archive often holds one folder that holds everything
    return _cifar10(*(_read_part(root / part, f"{shown}: {part}", progress) for part in ("train", "test")))


def _read_part(folder: Path, shown: str, progress: bool) -> tuple[Tensor, Tensor]:
    """Pixels `(N, 3, 32, 32)` uint8 and labels `(N,)` of one part."""
    if not folder.is_dir():
        raise BenchmarkError(f"{shown}/ is missing; expected train/<class>/*.jpg and test/<class>/*.jpg")
    found = {entry.name for entry in folder.iterdir() if entry.is_dir()}
    if not found:
        raise BenchmarkError(f"{shown}/ is empty; expected one folder of images a class")
    if found != set(CIFAR10_CLASSES):
        missing, extra = sorted(set(CIFAR10_CLASSES) - found), sorted(found - set(CIFAR10_CLASSES))
        raise BenchmarkError(
            f"{shown}/ holds {len(found)} classes that are not the model's {len(CIFAR10_CLASSES)}: "
            f"missing {missing}, unexpected {extra}"
        )
    try:
        images = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise BenchmarkError(f"{shown}/ has a class without images: {error}") from error
    with ThreadPoolExecutor(DECODING_THREADS) as threads:
        pixels = threads.map(_decode, [path for path, _ in images.samples])
        bar = tqdm(pixels, f"reading {folder.name}", len(images), unit="image", leave=False, disable=not progress)
        stacked = np.stack(list(bar))
    return torch.from_numpy(stacked).permute(0, 3, 1, 2), torch.tensor(images.targets)


def _decode(path: str) -> np.ndarray:
    """The image as `(32, 32, 3)` uint8."""
    try:
        pixels = np.asarray(pil_loader(path))
    except (OSError, SyntaxError, ValueError) as error:
        raise BenchmarkError(f"{path} cannot be read as an image: {error}") from error
    if pixels.shape[:2] != (CIFAR10_SIZE, CIFAR10_SIZE):
        height, width = pixels.shape[:2]
        raise BenchmarkError(f"{path} is {width}x{height} pixels, expected {CIFAR10_SIZE}x{CIFAR10_SIZE}")
    return pixels


CIFAR10 = Description(
    name="cifar10",
    title="CIFAR-10",
    load=lambda asked: load_cifar10(asked.data, asked.cache, download=asked.download, progress=asked.progress),
    output_count=lambda request, known: len(CIFAR10_CLASSES),
    image_shape=(3, CIFAR10_SIZE, CIFAR10_SIZE),
    iters=1000,
    n_calib=1024,
)
