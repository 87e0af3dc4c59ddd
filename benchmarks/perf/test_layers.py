"""A step of the fit of layers against full-precision forward and backward of the same images."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from baselines import quantize
from benchmarks.networks.layer_fits import fit_of_layers
from benchmarks.networks.models import mobilenetv2, resnet20
from benchmarks.perf.timings import Medians, normal, processor_time
from cat_plugin.layers.network import BATCH

MAX_RATIO = 2.2

pytestmark = processor_time
medians = Medians()
NETWORKS = {"resnet20": resnet20, "mobilenetv2": mobilenetv2}


@pytest.fixture(scope="module", params=NETWORKS)
def network(request) -> tuple[str, nn.Module, torch.Tensor]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return request.param, NETWORKS[request.param](10).eval(), normal(BATCH, 3, 32, 32, seed=0)


def test_full_precision(benchmark, network):
    name, model, images = network
    labels = torch.arange(BATCH) % 10

    def step() -> None:
        model.zero_grad()
        cross_entropy(model(images), labels).backward()

    benchmark.pedantic(step, rounds=15, warmup_rounds=2)
    medians.keep(f"{name} FP", benchmark)


def test_step(benchmark, network):
    name, model, images = network
    quantized = quantize(model, images, method="rtn", w_bits=4, a_bits=4)
    with fit_of_layers(quantized, model, images) as step:
        benchmark.pedantic(step, rounds=15, warmup_rounds=2)
    medians.keep(f"{name} step", benchmark)


@pytest.mark.parametrize("name", NETWORKS)
def test_against_full_precision(name, record_property):
    if not {f"{name} FP", f"{name} step"} <= set(medians):
        pytest.skip("needs the timings of the tests above in one run")
    ratio = medians[f"{name} step"] / medians[f"{name} FP"]
    figures = f"a step of the fit of layers, {name}, {BATCH} images: {ratio:.2f} times FP forward and backward"
    record_property("figures", figures)
    assert ratio <= MAX_RATIO
