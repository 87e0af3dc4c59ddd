"""The digits and the networks that know them, made once; the table that the run writes."""

import os
import random
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.cpp_extension import get_default_build_root

from benchmarks.datasets.dataset import Dataset
from benchmarks.datasets.digits import load_digits

from . import networks
from .protocol import Row, Task, check, write_table

FOLDER = Path(__file__).resolve().parents[2] / "results" / "integration"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.integration)


@pytest.fixture(scope="session", autouse=True)
def compiled_kernels() -> Iterator[None]:
    """NNCF and quanto compile kernels once, which takes minutes: kept where torch keeps them, not in a test's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", os.environ.get("TORCH_EXTENSIONS_DIR", get_default_build_root()))
        patch.setenv("NNCF_EXTENSION_LOAD_TIMEOUT", "0")
        yield


@pytest.fixture(autouse=True)
def surroundings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Toolkits draw from the global random states, and leave files in the current folder."""
    monkeypatch.chdir(tmp_path)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    return load_digits()


@pytest.fixture(scope="session")
def task(digits: Dataset) -> Task:
    return Task(digits)


@pytest.fixture(scope="session")
def resnet(digits: Dataset) -> nn.Module:
    return networks.convolutional(digits)


@pytest.fixture(scope="session")
def vit(digits: Dataset) -> nn.Module:
    return networks.transformer(digits)


@pytest.fixture(scope="session")
def hf_vit(digits: Dataset) -> nn.Module:
    return networks.hugging_face(digits)


@pytest.fixture(scope="session")
def table() -> Iterator[list[Row]]:
    """Rows of all tests that passed, written at the end."""
    rows: list[Row] = []
    yield rows
    if rows:
        write_table(rows, FOLDER)


@pytest.fixture
def judge(task: Task, table: list[Row]) -> Callable[..., Row]:
    """`check`, whose row goes into the table."""

    def judged(*args, **kwargs) -> Row:
        table.append(partial(check, task=task)(*args, **kwargs))
        return table[-1]

    return judged
