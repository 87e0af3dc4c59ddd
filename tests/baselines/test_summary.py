import json
import logging

import pytest
import torch
from torch import nn

from baselines import quantize, summarize

from .networks import SmallResNet, images, randomized


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.fc, self.never = nn.Conv2d(3, 4, 2, 2), nn.Linear(4, 3), nn.Linear(5, 5)

    def forward(self, x):
        x = self.stem(x).relu_().flatten(2).transpose(1, 2)
        x = torch.cat([x, x]).chunk(2)[0].contiguous()
        x = (x @ x.mT).softmax(-1) @ x + 1
        return self.fc(x.mean(1)) * 2


def test_table_of_a_small_network():
    summary = summarize(quantize(randomized(Small()), images(8), method="rtn", w_bits=4, a_bits=3))
    assert str(summary).splitlines() == [
        "2 layers with 60 weights (weights: 2 at 8 bits; inputs: 1 at 8 bits, 1 at FP), "
        "2 products (factors: 4 at 3 bits)",
        "",
        "name        kind     weights  weight bits  input bits",
        "stem        Conv2d   48       8            FP",
        "fc          Linear   12       8            8",
        "products.0  product                        3, 3",
        "products.1  product                        3, 3",
        "",
        "operations in floating point: relu x1, softmax x1, add x1, mean x1, mul x1",
        "left unquantized: never",
    ]


def test_dict_is_the_same_and_ready_for_json():
    summary = summarize(quantize(randomized(SmallResNet()), images(8), method="rtn", w_bits=32, a_bits=3))
    values = json.loads(json.dumps(summary.to_dict()))
    assert [layer["name"] for layer in values["layers"]] == [layer.name for layer in summary.layers]
    shared = {"name": "layer1.1.downsample.0", "kind": "Conv2d", "weights": 128}
    assert shared | {"weight_bits": 32, "input_bits": 3} in values["layers"]
    assert values["products"] == values["unquantized"] == []
    assert values["floating_point_operations"] == {"relu": 5, "add": 2, "adaptive_avg_pool2d": 1}


@pytest.mark.parametrize("blocks", [[], ["block"]], ids=["layers", "reads-the-input-of-its-block"])
def test_layers_that_are_called_twice_are_quantized_at_each_call(blocks):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.twice, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.last(self.twice(self.twice(x).relu()))

    model = nn.Sequential()
    model.stem, model.block, model.pool = nn.Conv2d(3, 4, 1), Block(), nn.AdaptiveAvgPool2d(1)
    model.flatten, model.fc = nn.Flatten(), nn.Linear(4, 2)
    network = quantize(randomized(model), images(8), method="rtn", a_bits=2, blocks=blocks)
    seen = []
    network.block.twice.register_forward_hook(lambda module, args, output: seen.append(module.input_quantizer(args[0])))
    network(images(4))
    assert len(seen) == 2 and all(len(x.unique()) <= 4 for x in seen)


def test_summary_survives_being_held_by_another_module():
    network = quantize(randomized(Small()), images(8), method="rtn")
    held = summarize(nn.Sequential(network))
    assert held.floating_point == summarize(network).floating_point
    assert held.layers[0].name == "0.stem"


def test_quantize_logs_the_headline(caplog):
    with caplog.at_level(logging.INFO, logger="baselines"):
        network = quantize(randomized(Small()), images(8), method="rtn")
    assert f"quantized {summarize(network).headline}" in caplog.text


def test_network_that_is_not_quantized_is_a_clear_error():
    with pytest.raises(ValueError, match="SmallResNet holds no quantized layer"):
        summarize(SmallResNet())
