import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn

from baselines import quantize
from baselines.network.reference_copy import held_network

from ..networks import SmallResNet, images, randomized, same


def compiled_inside(model):
    model = copy.deepcopy(model)
    model.layer1[0] = torch.compile(model.layer1[0])
    model.fc = nn.DataParallel(model.fc)
    return model


def compiled_in_place(model):
    model = copy.deepcopy(model)
    model.compile()
    return model


CONTAINERS = {
    "data-parallel": nn.DataParallel,
    "compiled": torch.compile,
    "both": lambda model: torch.compile(nn.DataParallel(model)),
    "inside": compiled_inside,
    "in-place": compiled_in_place,
}
OPTIONS = {"method": "qdrop", "iters": 2, "batch_size": 8}


@pytest.fixture(scope="module")
def expected():
    return quantize(randomized(SmallResNet()), images(16), **OPTIONS)


@pytest.mark.parametrize("contain", CONTAINERS.values(), ids=CONTAINERS)
def test_network_inside_of_a_container_is_quantized(contain, expected):
    model = contain(randomized(SmallResNet()))
    classes = [type(module) for module in model.modules()]
    network = quantize(model, images(16), **OPTIONS)
    assert type(network) is SmallResNet and same(network, expected)
    assert torch.equal(network(images(4)), expected(images(4)))
    assert [type(module) for module in model.modules()] == classes


def test_network_of_several_processes_is_quantized(expected, tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        network = quantize(nn.parallel.DistributedDataParallel(randomized(SmallResNet())), images(16), **OPTIONS)
    finally:
        dist.destroy_process_group()
    assert type(network) is SmallResNet and same(network, expected)


def test_a_users_module_that_holds_one_is_no_container():
    class DataParallel(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Linear(2, 2)

    model = DataParallel()
    assert held_network(model) is model


@pytest.mark.filterwarnings("ignore")
def test_values_made_in_inference_mode_are_quantized(expected):
    with torch.inference_mode():
        model = randomized(SmallResNet())
    network = quantize(model, images(16), **OPTIONS)
    assert same(network, expected)
    network(images(2).requires_grad_()).sum().backward()
