"""Rounding a network to nearest, its ranges searched for, against full-precision passes over the same images."""

import pytest
import torch
import torchvision
from torch import nn

from baselines import quantize
from benchmarks.perf.timings import Medians, normal, processor_time

IMAGES = 128
MAX_PASSES = 3.0

pytestmark = processor_time
medians = Medians()


@pytest.fixture(scope="module")
def network() -> tuple[nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return torchvision.models.mobilenet_v2().eval(), normal(IMAGES, 3, 224, 224, seed=0)


@torch.no_grad()
def test_full_precision(benchmark, network):
    model, images = network
    benchmark.pedantic(lambda: [model(part) for part in images.split(32)], rounds=1)
    medians.keep("pass", benchmark)


def test_rounding_to_nearest(benchmark, network):
    model, images = network
    quantizing = {"method": "rtn", "w_bits": 4, "a_bits": 4}
    benchmark.pedantic(quantize, (model, images), quantizing, rounds=1)
    medians.keep("rounding", benchmark)


def test_against_full_precision(record_property):
    if not {"pass", "rounding"} <= set(medians):
        pytest.skip("needs the timings of the tests above in one run")
    passes = medians["rounding"] / medians["pass"]
    record_property("figures", f"rounding MobileNetV2 to nearest at W4A4, {IMAGES} images: {passes:.2f} FP passes")
    assert passes <= MAX_PASSES
