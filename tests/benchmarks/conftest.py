"""A CIFAR-10 of a few generated images, as folder and archive, and weights for it; a data set of noise."""

import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from benchmarks.data import CIFAR10_CLASSES, Dataset
from benchmarks.models import create_model

IMAGES = {"train": 6, "test": 2}  # a class


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory) -> Path:
    """Read only; tests that change it take ``cifar_folder``."""
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
    save_file(create_model("resnet20", 10, seed=3).state_dict(), path)
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
