import copy
import pickle

import pytest
import torch
from torch import fx, nn

from baselines import quantize, summarize
from baselines.graphs import with_modules
from baselines.network.blocks import find_blocks
from baselines.network.trace import trace

from .networks import LongSkip, SmallResNet, images, randomized, same
from .test_architectures import mobilenet, regnet


@pytest.mark.parametrize(("build", "size"), [(SmallResNet, 8), (mobilenet, 16), (regnet, 16)])
@pytest.mark.filterwarnings("ignore")
def test_traced_networks_have_the_blocks_of_what_was_traced(build, size):
    model = randomized(build())
    traced = with_modules(fx.symbolic_trace(model))
    x = images(2, size=size)
    assert same(traced, model) and torch.equal(traced(x), model(x))
    blocks = find_blocks(model, trace(model, x))
    assert find_blocks(traced, trace(traced, x)) == blocks != []
    for other in (copy.deepcopy(traced), pickle.loads(pickle.dumps(traced))):
        assert torch.equal(other(x), model(x)) and same(other, model)


@pytest.mark.parametrize("hold", [lambda traced: traced, nn.Sequential], ids=["alone", "inside"])
def test_quantized_like_what_was_traced(hold):
    model = randomized(SmallResNet())
    traced = hold(fx.symbolic_trace(model))
    before = [type(module) for module in traced.modules()]
    options = {"method": "qdrop", "w_bits": 2, "a_bits": 2, "iters": 2, "batch_size": 8}
    network, expected = quantize(traced, images(16), **options), quantize(hold(model), images(16), **options)
    assert same(network, expected)
    assert torch.equal(network(images(4)), expected(images(4)))
    assert summarize(network).layers == summarize(expected).layers
    assert [type(module) for module in traced.modules()] == before


def test_blocks_of_a_traced_network_can_be_named():
    options = {"method": "qdrop", "iters": 2, "batch_size": 8, "blocks": ["layer1.1"]}
    model = randomized(SmallResNet())
    network = quantize(fx.symbolic_trace(model), images(16), **options)
    assert same(network, quantize(model, images(16), **options))


class WithDefaults(LongSkip):
    def forward(self, x, scale=2.0, shift: float = 0.5):
        return super().forward(x) * scale + shift


def test_arguments_and_their_defaults():
    model = randomized(WithDefaults())
    traced = with_modules(fx.symbolic_trace(model))
    x = images(2)
    assert torch.equal(traced(x), model(x))
    assert torch.equal(traced(x, 3.0), model(x, 3.0))
    assert torch.equal(traced(x, shift=4.0, scale=1.0), model(x, shift=4.0, scale=1.0))


@pytest.mark.parametrize(("method", "said"), [("qdrop", True), ("adaround", False)])
def test_graphs_that_tell_nothing_of_modules_are_said(method, said, caplog):
    traced = fx.symbolic_trace(randomized(SmallResNet()))
    for node in traced.graph.nodes:
        node.meta.clear()
    quantize(traced, images(16), method=method, iters=1, batch_size=8)
    assert ("no blocks are found in the graph of SmallResNet" in caplog.text) == said
