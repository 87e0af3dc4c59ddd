"""ImageNet, or any images like it, in files that are decoded when they are needed."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import BenchmarkError
from benchmarks.datasets.class_labels import are_numbers, chosen_classes, indices, possible_classes, read_classes
from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.description import Description, Request
from benchmarks.datasets.image_places import LAYOUT, Files, Place, joined, place_of, unlabelled
from benchmarks.datasets.images import CPU_BATCH, FILES_BATCH, ImageFiles
from benchmarks.wording import some

CLASSES, VAL_IMAGES = 1000, 50_000
PARTS = {"test": "val", "calib": "train"}
ENTRIES_SHOWN = 3
SPLIT_SEED = 0  # of places that serve for everything: the same images test whatever the seed of a row is


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where images for quantization, for corrections and for testing are.

    Without `calib`, some of the test images are held out for all that is not testing; without `cat`, corrections take
    others of the images for quantization.
    """

    calib: tuple[Place, ...]
    cat: tuple[Place, ...]
    test: tuple[Place, ...]

    def class_lists(self, request: Request) -> list[tuple[str, ...]]:
        """See `possible_classes`."""
        given = None if request.classes is None else read_classes(request.classes)
        return possible_classes(self.calib, self.test, given)


def default_workers(sharing: int = 1) -> int:
    """Processes that decode, where the user does not say how many and `sharing` runs share the machine."""
    return max(1, min(8, (os.cpu_count() or 1) // sharing))


def find_places(request: Request) -> Places:
    """The places that the options name, or that `--data` stands for.

    Raises:
        BenchmarkError: one is missing, see `place_of`; or test images have no labels.
    """
    found = {name: _places(getattr(request, f"{name}_data"), request.cache, name) for name in ("calib", "cat", "test")}
    if request.data is not None:
        parts = {name: _part(request.data, part) for name, part in PARTS.items()}
        # Without train/ and val/, what it holds is to test on, or else to calibrate on; val.txt may be of flat images.
        if None in parts.values() and not any((request.data / part).is_dir() for part in PARTS.values()):
            parts = {"calib" if found["test"] else "test": str(request.data)}
        for name, part in parts.items():
            if not found[name]:
                if part is None:
                    raise _missing(request.data, PARTS[name])
                found[name] = _places((part,), request.cache, name)
    for place in found["test"]:
        if not place.is_labelled:
            raise unlabelled(place)
    return Places(**found)


def output_count(request: Request, known: int | None = None) -> int:
    """How many outputs a network for these images has: as many as are `known`, else the likeliest number.

    Raises:
        BenchmarkError: labels that do not fit these, see `chosen_classes`; or as of `find_places`.
    """
    if request.data is None and not request.test_data:
        return CLASSES if known is None else known
    places = find_places(request)
    return len(chosen_classes(places.class_lists(request), places.test, known, others=False))


def load_imagenet(request: Request) -> Dataset:
    """The files of all places; labels go by `request.classes`, or by what fits the number of the network's outputs.

    Raises:
        BenchmarkError: see `find_places`, `possible_classes` and `chosen_classes`.
    """
    places = find_places(request)
    numbers, lists = are_numbers(places.test), places.class_lists(request)
    calib, cat, test = (_files(each) for each in (places.calib, places.cat, places.test))
    images = {
        name: _images(files, request) for name, files in (("calib", calib), ("cat", cat), ("test", test)) if files
    }
    outputs = None if request.outputs is None else request.outputs(images["test"].first())
    classes = chosen_classes(lists, places.test, outputs, others=request.classes is None)
    test_labels = indices(test, classes, numbers)
    rest, held = torch.arange(len(test.names)), None
    if calib is None:
        held, rest = _held_out(len(test.names), request)
    return Dataset(
        name=IMAGENET.name,
        train_images=images["calib"] if calib else images["test"][held],
        train_labels=indices(calib, classes, False) if calib else test_labels[held],
        cat_images=images.get("cat"),
        test_images=images["test"][rest],
        test_labels=test_labels[rest],
        classes=classes,
        test_folds=request.test_folds,
    )


def _places(texts: Sequence[str], cache: Path, name: str) -> tuple[Place, ...]:
    return tuple(place_of(text, cache, labels_needed=name == "test") for text in texts)


def _part(root: Path, part: str) -> str | None:
    """Folder, or else file of labels, of a part of `--data`."""
    found = [path for path in (root / part, root / f"{part}.txt", root / f"{part}.csv") if path.exists()]
    return str(found[0]) if found else None


def _missing(root: Path, part: str) -> BenchmarkError:
    found = sorted(entry.name for entry in root.iterdir())
    option = "--test-data" if part == "val" else "--calib-data"
    return BenchmarkError(
        f"{root / part}/ is missing; {LAYOUT}, found {some(found, ENTRIES_SHOWN) or 'an empty folder'}; {option} names "
        "another place"
    )


def _files(places: Sequence[Place]) -> Files | None:
    return joined([place.files() for place in places]) if places else None


def _images(files: Files, request: Request) -> ImageFiles:
    return ImageFiles(
        root=files.root,
        names=files.names,
        transform=request.transform,
        workers=request.workers,
        at_once=FILES_BATCH if request.accelerated else CPU_BATCH,
    )


def _held_out(images: int, request: Request) -> tuple[Tensor, Tensor]:
    """Rows that are not for testing, and those that are, in their order: half of them, or with folds, where all others
    test in turn, as many as quantization takes."""
    number = images // 2 if request.test_folds == 1 else request.n_calib
    if not 0 < number < images:
        raise BenchmarkError(
            f"{images:,} images serve for everything, of which quantization takes {number:,}; lower --n-calib, or name "
            "other images by --calib-data"
        )
    order = torch.randperm(images, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[:number].sort().values, order[number:].sort().values


IMAGENET = Description(
    name="imagenet",
    title="ImageNet",
    load=load_imagenet,
    output_count=output_count,
    image_shape=(3, 224, 224),
    iters=20_000,
    n_calib=1024,
    in_files=True,
    published=True,
)
