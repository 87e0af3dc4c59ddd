"""ImageNet, or any folder in its layout: `train/<class>/*` and `val/<class>/*`, decoded when it is needed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from benchmarks import BenchmarkError
from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.description import Description
from benchmarks.datasets.images import ImageFiles
from benchmarks.wording import some

CLASSES, VAL_IMAGES = 1000, 50_000
PARTS = "train", "val"
LAYOUT = "expected train/<class>/*.JPEG and val/<class>/*.JPEG"
CLASSES_SHOWN = 3


def default_workers(sharing: int = 1) -> int:
    """Processes that decode, where the user does not say how many and `sharing` runs share the machine."""
    return max(1, min(8, (os.cpu_count() or 1) // sharing))


def class_names(root: Path) -> tuple[str, ...]:
    """Class folders of both parts in the order of the networks' outputs, which is that of their names.

    Raises:
        BenchmarkError: no such folder, a part that is missing or not sorted into classes, or classes that differ.
    """
    if not root.is_dir():
        what = "is a file; extract it first" if root.is_file() else "is no folder"
        raise BenchmarkError(f"--data {root} {what}; {LAYOUT}")
    train, val = (_classes_of(root, part) for part in PARTS)
    if train != val:
        only = {part: sorted(names) for part, names in (("train", train - val), ("val", val - train)) if names}
        found = "; ".join(
            f"only {part}/ has {len(names)}: {some(names, CLASSES_SHOWN)}" for part, names in only.items()
        )
        raise BenchmarkError(
            f"{root}: train/ holds {len(train):,} classes and val/ {len(val):,}, and they differ: {found}; expected "
            "the same folders in both"
        )
    return tuple(sorted(train))


def load_imagenet(root: Path, transform: Callable[[Any], Tensor], workers: int) -> Dataset:
    """The files of both parts; `transform` is that of the network, `workers` processes decode.

    Raises:
        BenchmarkError: see `class_names`; or a class without images.
    """
    classes = class_names(root)
    (train, train_labels), (val, val_labels) = (_files_of(root, part, transform, workers) for part in PARTS)
    return Dataset(
        name=IMAGENET.name,
        train_images=train,
        train_labels=train_labels,
        test_images=val,
        test_labels=val_labels,
        classes=classes,
    )


def _classes_of(root: Path, part: str) -> set[str]:
    folder = root / part
    if not folder.is_dir():
        found = sorted(entry.name for entry in root.iterdir())
        raise BenchmarkError(f"{folder}/ is missing; {LAYOUT}, found {some(found, CLASSES_SHOWN) or 'an empty folder'}")
    entries = list(os.scandir(folder))
    classes = {entry.name for entry in entries if entry.is_dir()}
    if not classes:
        loose = sum(entry.name.lower().endswith(IMG_EXTENSIONS) for entry in entries)
        what = f"holds {loose:,} images that are not sorted into class folders" if loose else "is empty"
        raise BenchmarkError(f"{folder}/ {what}; {LAYOUT}")
    return classes


def _files_of(root: Path, part: str, transform: Callable[[Any], Tensor], workers: int) -> tuple[ImageFiles, Tensor]:
    try:
        found = ImageFolder(str(root / part))
    except FileNotFoundError as error:
        raise BenchmarkError(f"{root / part}/ has classes without images: {error}") from error
    names = tuple(Path(path).relative_to(root).as_posix() for path, _ in found.samples)
    return ImageFiles(root=root, names=names, transform=transform, workers=workers), torch.tensor(found.targets)


IMAGENET = Description(
    name="imagenet",
    title="ImageNet",
    load=lambda request: load_imagenet(request.data, request.transform, request.workers),
    count_classes=lambda folder: CLASSES if folder is None else len(class_names(folder)),
    image_shape=(3, 224, 224),
    iters=20_000,
    n_calib=1024,
    in_files=True,
    published=True,
)
