"""Is the full-precision network as accurate as published? If not, no figure behind it is worth anything."""

import json
import re
from pathlib import Path

import torch
from torch import nn

from baselines.files import digest_tensors
from benchmarks import BenchmarkError
from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.imagenet import CLASSES, VAL_IMAGES
from benchmarks.datasets.images import batches
from benchmarks.measure.accuracy import top1
from benchmarks.runs.environment import code_digest, versions
from benchmarks.runs.files import digest_text, write_text

TOLERANCE = 0.5  # percentage points
TENSOR_BATCH = 256


def check_accuracy(
    model: nn.Module,
    dataset: Dataset,
    expected: float,
    source: str,
    cache: Path,
    *,
    images: int | None = None,
    progress: bool = False,
) -> str:
    """Compare top-1 on all test images with `expected` percent, which `source` states; one sentence about it.

    `images` is how many `expected` is for, as far as that is known: on others, which may be easier or harder, only less
    than half of it is too far off.

    Raises:
        BenchmarkError: they differ by more than `TOLERANCE` points; the message names likely causes.
    """
    found = accuracy(model, dataset, cache, progress=progress)
    difference = found - expected
    others = images is not None and images != len(dataset.test_images)
    if others and found >= expected / 2:
        return (
            f"full-precision top-1 {found:.3f} % on {len(dataset.test_images):,} images; not comparable with "
            f"{expected:.3f} %, which {source} says of {images:,}"
        )
    if abs(difference) > TOLERANCE:
        causes = "\n".join(f"- {cause}" for cause in _causes(dataset))
        raise BenchmarkError(
            f"full-precision top-1 is {found:.3f} % on {len(dataset.test_images):,} images, {source} says "
            f"{expected:.3f} %: {difference:+.3f} points, more than {TOLERANCE:g}. Nothing was quantized. Likely "
            f"causes:\n{causes}"
        )
    return (
        f"full-precision top-1 {found:.3f} % on {len(dataset.test_images):,} images; {source} says {expected:.3f} %, "
        f"so the difference is {difference:+.3f} points"
    )


def accuracy(model: nn.Module, dataset: Dataset, cache: Path, *, progress: bool = False) -> float:
    """Top-1 in percent on all test images, from `cache` where it was measured before."""
    device = next(model.parameters()).device.type
    data = digest_tensors(model.state_dict()), type(model).__qualname__, dataset.test_digest()
    parts = *data, device, repr(versions()), code_digest(__name__)
    path = cache / "fp-accuracy" / f"{digest_text(*parts)}.json"
    try:
        return float(json.loads(path.read_text("utf-8"))["top1"])
    except (OSError, ValueError, TypeError, KeyError):
        pass  # not measured yet, or the file is damaged: measure
    found = _measured(model, dataset, progress)
    write_text(path, json.dumps({"top1": found, "images": len(dataset.test_images)}) + "\n")
    return found


@torch.inference_mode()
def _measured(model: nn.Module, dataset: Dataset, progress: bool) -> float:
    device = next(model.parameters()).device
    images = batches(dataset.test_images, "full-precision accuracy" if progress else None)
    if isinstance(images, torch.Tensor):
        images = images.split(TENSOR_BATCH)
    predicted = [model(batch.to(device)).argmax(1).cpu() for batch in images]
    return top1(torch.cat(predicted), dataset.test_labels)


def _causes(dataset: Dataset) -> list[str]:
    """What goes wrong most often, with what is known about these data."""
    images, classes = len(dataset.test_images), dataset.classes
    wnids = sum(re.fullmatch(r"n\d{8}", name) is not None for name in classes)
    named = f"{wnids:,} of {len(classes):,} classes are called like n01440764, the first is {classes[0]}"
    prepared = repr(getattr(dataset.test_images, "transform", None)).replace("\n", " ")
    sizes = dataset.test_labels.bincount(minlength=len(classes))
    return [
        f"an incomplete val folder: it holds {images:,} images, ImageNet's {VAL_IMAGES:,}",
        f"the order of classes, which is that of the sorted folder names, wnids of {CLASSES:,} classes: {named}",
        f"val images in wrong class folders: there are {sizes.min():,} to {sizes.max():,} a class, ImageNet has 50",
        f"another transform or image size than the weights were made for: {prepared}",
        "another version of the weights than the figure is for (IMAGENET1K_V1 and V2 differ by up to 5 points)",
        "damaged or re-encoded images, or images that were resized before",
    ]
