"""Accuracy of the full-precision network against what is published."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks import BenchmarkError
from benchmarks.datasets.description import Request
from benchmarks.datasets.imagenet import load_imagenet
from benchmarks.datasets.images import stacked
from benchmarks.measure import fp_check
from benchmarks.measure.fp_check import accuracy, check_accuracy
from benchmarks.networks.weights_and_transforms import untrained
from tests.benchmarks.conftest import SMALL


@pytest.fixture(scope="module")
def model():
    return untrained("resnet18", 3, seed=4)


@pytest.fixture
def dataset(shared_imagenet):
    return load_imagenet(Request(data=shared_imagenet, cache=shared_imagenet.parent, transform=SMALL))


@pytest.fixture
def passes(model):
    """Of images through the network, one a batch."""
    seen = []
    handle = model.register_forward_hook(lambda module, args, output: seen.append(len(args[0])))
    yield seen
    handle.remove()


def by_hand(model, dataset):
    with torch.no_grad():
        right = model(stacked(dataset.test_images)).argmax(1) == dataset.test_labels
    return 100 * sum(right.tolist()) / len(right)


def test_accuracy_is_that_of_all_test_images(model, dataset, tmp_path):
    expected = by_hand(model, dataset)
    assert 0 < expected < 100
    assert accuracy(model, dataset, tmp_path) == pytest.approx(expected, abs=1e-3)


def test_images_in_memory_are_measured_alike(model, dataset, tmp_path):
    in_memory = replace(dataset, train_images=torch.zeros(1), test_images=stacked(dataset.test_images))
    assert accuracy(model, in_memory, tmp_path) == pytest.approx(by_hand(model, dataset), abs=1e-3)


def test_accuracy_is_measured_once(model, dataset, tmp_path, passes):
    first = accuracy(model, dataset, tmp_path)
    assert sum(passes) == 15
    assert accuracy(model, dataset, tmp_path) == first and sum(passes) == 15
    (path,) = (tmp_path / "fp-accuracy").iterdir()
    assert json.loads(path.read_text()) == {"top1": first, "images": 15}
    path.write_text("{")
    assert accuracy(model, dataset, tmp_path) == first and sum(passes) == 30


@pytest.mark.parametrize("change", ["weights", "label", "images", "transform", "code"])
def test_any_change_measures_again(model, dataset, tmp_path, passes, change, monkeypatch):
    accuracy(model, dataset, tmp_path)
    if change == "weights":
        with torch.no_grad():
            model.fc.bias += 1
    if change == "code":
        monkeypatch.setattr(fp_check, "code_digest", lambda *modules: "another")
    if change == "label":
        dataset = replace(dataset, test_labels=dataset.test_labels.flip(0))
    if change == "images":
        dataset = replace(dataset, test_images=dataset.test_images[:14], test_labels=dataset.test_labels[:14])
    if change == "transform":
        dataset = replace(dataset, test_images=replace(dataset.test_images, transform=lambda image: SMALL(image)))
    accuracy(model, dataset, tmp_path)
    assert len(passes) == 2


@pytest.mark.parametrize("off", [-0.49, 0.0, 0.49])
def test_half_a_point_is_let_pass(model, dataset, tmp_path, off):
    expected = by_hand(model, dataset) + off
    told = check_accuracy(model, dataset, expected, "the paper", tmp_path)
    assert f"on 15 images; the paper says {expected:.3f} %, so the difference is {-off:+.3f} points" in told


@pytest.mark.parametrize("off", [-0.51, 0.51, 30.0])
def test_more_stops_with_both_figures_and_the_causes(model, dataset, tmp_path, off):
    found = by_hand(model, dataset)
    with pytest.raises(BenchmarkError) as error:
        check_accuracy(model, dataset, found + off, "torchvision's V1", tmp_path)
    text = str(error.value)
    assert f"top-1 is {found:.3f} % on 15 images, torchvision's V1 says {found + off:.3f} %: {-off:+.3f} points" in text
    for cause in (
        "an incomplete val folder: it holds 15 images, ImageNet's 50,000",
        "3 of 3 classes are called like n01440764, the first is n00000003",
        "there are 5 to 5 a class, ImageNet has 50",
        "another transform or image size than the weights were made for: ImageClassification",
        "IMAGENET1K_V1 and V2",
        "damaged",
    ):
        assert cause in text


def test_modes_of_the_network_are_left_alone(dataset, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 3)).eval()
    accuracy(model, dataset, tmp_path)
    assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_what_is_published_for_other_images_only_stops_what_is_far_off(model, dataset, tmp_path):
    found = by_hand(model, dataset)
    told = check_accuracy(model, dataset, 1.9 * found, "torchvision's V1", tmp_path, images=50_000)
    assert (
        f"{found:.3f} % on 15 images; not comparable with {1.9 * found:.3f} %, which torchvision's V1 says of 50,000"
        in told
    )
    with pytest.raises(BenchmarkError, match="Nothing was quantized"):
        check_accuracy(model, dataset, 2.1 * found, "torchvision's V1", tmp_path, images=50_000)
    with pytest.raises(BenchmarkError, match="Nothing was quantized"):
        check_accuracy(model, dataset, 1.9 * found, "torchvision's V1", tmp_path, images=15)
