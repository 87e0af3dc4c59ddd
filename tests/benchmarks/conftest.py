"""A CIFAR-10 and an ImageNet of a few generated images, weights for them, and a data set of noise."""

import shutil
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms._presets import ImageClassification

from benchmarks.commands import loading
from benchmarks.datasets.cifar10 import CIFAR10_CLASSES
from benchmarks.datasets.dataset import Dataset
from benchmarks.networks import quantized
from benchmarks.networks.weights_and_transforms import load_pretrained, untrained

IMAGES = {"train": 6, "test": 2}  # a class
WNIDS = "n00000003", "n00000007", "n00000100"
IMAGENET_IMAGES = {"train": 14, "val": 5}  # a class
SMALL = ImageClassification(crop_size=32, resize_size=36)


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """Read only; tests that change it take `cifar_folder`."""
    root = tmp_path_factory.mktemp("cifar10")
    generator = np.random.default_rng(0)
    for part, number in IMAGES.items():
        for name in CIFAR10_CLASSES:
            (root / part / name).mkdir(parents=True)
            for index in range(number):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{index:04d}.jpg")
    return root


@pytest.fixture
def cifar_folder(shared_folder, tmp_path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(shared_folder, tmp_path / "cifar10"))


@pytest.fixture(scope="session")
def cifar_zip(shared_folder, tmp_path_factory) -> Path:
    archive = tmp_path_factory.mktemp("archive") / "cifar10.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(shared_folder.rglob("*.jpg")):
            opened.write(path, path.relative_to(shared_folder))
    return archive


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> Path:
    """Random weights of a ResNet-20."""
    path = tmp_path_factory.mktemp("weights") / "resnet20.safetensors"
    save_file(untrained("resnet20", 10, seed=3).state_dict(), path)
    return path


@pytest.fixture
def tiny(shared_folder, weights, tmp_path) -> list[str]:
    """Options of a run that takes seconds; options that follow override them."""
    return [
        *("--dataset", "cifar10", "--data", str(shared_folder), "--weights", str(weights)),
        *("--methods", "rtn", "--bits", "4/4", "--iters", "2", "--n-calib", "16", "--n-cat", "40"),
        *("--batch-size", "8", "--results", str(tmp_path / "results"), "--no-progress"),
    ]


@pytest.fixture(scope="session")
def dataset() -> Dataset:
    """Digits that are noise; read only."""
    generator = torch.Generator().manual_seed(0)
    return Dataset(
        name="noise",
        train_images=torch.randn(40, 1, 8, 8, generator=generator),
        train_labels=torch.arange(40) % 10,
        test_images=torch.randn(20, 1, 8, 8, generator=generator),
        test_labels=torch.arange(20) % 10,
        classes=tuple("0123456789"),
    )


@pytest.fixture(scope="session")
def shared_imagenet(tmp_path_factory) -> Path:
    """ImageNet's layout: JPEG files of several sizes, the first one of a class grey; read only."""
    root = tmp_path_factory.mktemp("imagenet")
    generator = np.random.default_rng(0)
    for part, number in IMAGENET_IMAGES.items():
        for name in WNIDS:
            (root / part / name).mkdir(parents=True)
            for index in range(number):
                size = generator.integers(40, 80, 2)
                blobs = Image.fromarray(generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(tuple(size))
                blobs.convert("RGB" if index else "L").save(root / part / name / f"{part}_{index}.JPEG")
    return root


@pytest.fixture
def imagenet_folder(shared_imagenet, tmp_path) -> Path:
    """A copy for one test."""
    return Path(shutil.copytree(shared_imagenet, tmp_path / "imagenet"))


@pytest.fixture(scope="session")
def imagenet_weights(tmp_path_factory) -> Path:
    """Random weights of a ResNet-18 for the three classes."""
    path = tmp_path_factory.mktemp("weights") / "resnet18.safetensors"
    save_file(untrained("resnet18", len(WNIDS), seed=3).state_dict(), path)
    return path


@pytest.fixture
def small_images(monkeypatch) -> ImageClassification:
    """All networks get images of 32x32 pixels, which take little time."""

    def load(*args, **options):
        return replace(load_pretrained(*args, **options), transform=SMALL)

    monkeypatch.setattr(loading, "load_pretrained", load)
    return SMALL


@pytest.fixture
def cheap_ranges(monkeypatch) -> None:
    """Quantizers take smallest and largest value: the search for better ranges takes half a minute for a ResNet-18."""
    monkeypatch.setattr(quantized, "quantize", partial(quantized.quantize, range_method="minmax"))


@pytest.fixture
def tiny_imagenet(shared_imagenet, imagenet_weights, small_images, cheap_ranges, tmp_path) -> list[str]:
    """Options of a comparison that takes seconds; options that follow override them."""
    return [
        *("--dataset", "imagenet", "--data", str(shared_imagenet), "--model", "resnet18", "--workers", "0"),
        *("--weights", str(imagenet_weights), "--methods", "rtn", "--bits", "4/4", "--n-calib", "8"),
        *("--batch-size", "4", "--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache")),
        "--no-progress",
    ]
