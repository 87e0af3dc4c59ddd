"""What is said of the data sets, against their images; and nobody asks for one by its name."""

import ast
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks.datasets.description import Request
from benchmarks.datasets.imagenet import IMAGENET
from benchmarks.datasets.registry import DATASETS, DEFAULT_DATASET
from benchmarks.networks.catalogue import NETWORKS, is_for
from benchmarks.networks.weights_and_transforms import untrained
from tests.benchmarks.conftest import SMALL, WNIDS


@pytest.mark.parametrize(("name", "data"), [("digits", None), ("cifar10", "shared_folder")])
def test_images_and_classes_are_as_described(name, data, request, tmp_path):
    folder = data and request.getfixturevalue(data)
    asked = Request(data=folder, cache=tmp_path)
    dataset = DATASETS[name].load(asked)
    assert dataset.name == name
    assert dataset.train_images.shape[1:] == dataset.test_images.shape[1:] == DATASETS[name].image_shape
    assert len(dataset.classes) == DATASETS[name].output_count(asked, None)


def test_files_are_transformed_and_classes_are_those_of_the_folder(shared_imagenet, tmp_path):
    asked = Request(data=shared_imagenet, cache=tmp_path, transform=SMALL, workers=3)
    dataset = IMAGENET.load(asked)
    assert (dataset.train_images.transform, dataset.test_images.workers) == (SMALL, 3)
    assert IMAGENET.output_count(asked, None) == len(WNIDS) == len(dataset.classes)
    assert IMAGENET.output_count(Request(data=None, cache=tmp_path), None) == 1000


@pytest.mark.parametrize("name", DATASETS)
def test_first_network_takes_the_images_and_tells_the_classes(name, tmp_path):
    classes, network = DATASETS[name].output_count(Request(data=None, cache=tmp_path), None), NETWORKS[name][0]
    model = untrained(network, classes)
    assert model(torch.zeros(1, *DATASETS[name].image_shape)).shape == (1, classes)
    assert is_for(network, DATASETS[name]) and not any(
        is_for(network, DATASETS[other]) for other in {*DATASETS} - {name}
    )


def test_the_default_needs_nothing():
    assert DATASETS[DEFAULT_DATASET].bundled_with and DATASETS[DEFAULT_DATASET].network_is_trained


def test_further_networks_of_timm_are_for_data_sets_that_they_are_published_for():
    assert is_for("deit_base_distilled_patch16_224", IMAGENET)
    assert not is_for("deit_base_distilled_patch16_224", replace(IMAGENET, published=False))


def asked_by_name(code: str) -> list[int]:
    """Lines that compare something with the name of a data set, or with one of its module."""
    compared = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Compare | ast.match_case)]
    names = {*DATASETS, *(name.upper() for name in DATASETS)}
    return [
        part.lineno
        for node in compared
        for part in ast.walk(node)
        if (isinstance(part, ast.Constant) and part.value in names) or (isinstance(part, ast.Name) and part.id in names)
    ]


def test_no_command_compares_the_name_of_a_data_set():
    for path in (Path(benchmarks.__file__).parent / "commands").glob("*.py"):
        assert not asked_by_name(path.read_text("utf-8")), path.name
    assert asked_by_name('if args.dataset == "digits":\n    pass\nelif name != IMAGENET.name:\n    pass') == [1, 3]
