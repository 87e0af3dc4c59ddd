import pytest
import torch
import torchvision
from torch import nn

from baselines.trace import trace
from baselines.units import find_blocks, find_units

from .networks import SmallResNet, images, randomized


def blocks_of(model, size=32):
    model.eval()
    x = images(1, size=size)
    return find_blocks(model, trace(model, x))


def test_blocks_and_layers_of_a_small_resnet_in_calling_order():
    model = randomized(SmallResNet())
    record = trace(model, images(1))
    blocks = find_blocks(model, record)
    assert blocks == ["layer1.0", "layer1.1"]
    assert [u.name for u in find_units(model, record, blocks, "block")] == ["conv1", "layer1.0", "layer1.1", "fc"]
    layers = [u.name for u in find_units(model, record, blocks, "layer")]
    inner = ["layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2", "layer1.1.downsample.0"]
    assert layers == ["conv1", *inner, "fc"]


def test_activation_right_behind_a_unit_is_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.Flatten(), nn.Linear(256, 3))
    units = find_units(model, trace(model, images(1)), [], "layer")
    assert [(u.name, u.activation, u.channel_axis) for u in units] == [("0", "1", 1), ("2", None, 1), ("4", None, -1)]


@pytest.mark.parametrize(
    ("build", "count", "example"),
    [
        (torchvision.models.resnet18, 8, "layer1.0"),
        (torchvision.models.resnet50, 16, "layer4.2"),
        (torchvision.models.mobilenet_v2, 17, "features.1"),
        (torchvision.models.mnasnet0_5, 16, "layers.8.0"),
        (torchvision.models.regnet_x_400mf, 22, "trunk_output.block1.block1-0"),
        (torchvision.models.efficientnet_b0, 16, "features.1.0"),
        (torchvision.models.swin_t, 12, "features.1.0"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_blocks_of_torchvision_networks(build, count, example):
    with torch.random.fork_rng():
        blocks = blocks_of(build(weights=None))
    assert len(blocks) == count
    assert example in blocks


def test_blocks_that_are_attributes_are_found_innermost():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x + self.b(self.a(x))

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Body(), Body()

        def forward(self, x):
            return self.second(self.first(x))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = Backbone()

        def forward(self, x):
            return self.backbone(x).mean((2, 3))

    assert blocks_of(Whole()) == ["backbone.first", "backbone.second"]


def test_a_module_called_twice_is_no_unit():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x)).mean((2, 3)))

    model = Twice().eval()
    assert [u.name for u in find_units(model, trace(model, images(1)), [], "layer")] == ["fc"]


@pytest.mark.parametrize("call", ["extra", "keyword", "list"])
def test_block_called_with_more_than_a_tensor_is_no_block(call):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x, times=1):
            x = x[0] if isinstance(x, list) else x
            return self.b(self.a(x)) * times

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x):
            calls = {
                "extra": lambda: self.block(x, 3),
                "keyword": lambda: self.block(x=x),
                "list": lambda: self.block([x]),
            }
            return calls[call]().mean((2, 3))

    model = Whole().eval()
    record = trace(model, images(1))
    assert find_blocks(model, record) == []
    assert [u.name for u in find_units(model, record, [], "block")] == ["block.a", "block.b"]


def test_activation_that_is_not_the_only_reader_is_not_part_of_the_unit():
    class PreActivation(nn.Module):
        def __init__(self):
            super().__init__()
            self.relu, self.a, self.b = nn.ReLU(), nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return x + self.b(self.a(self.relu(x)).relu())

    model = nn.Sequential(nn.Conv2d(3, 3, 1), PreActivation(), PreActivation()).eval()
    record = trace(model, images(1))
    units = find_units(model, record, find_blocks(model, record), "block")
    assert [(u.name, u.activation) for u in units] == [("0", None), ("1", None), ("2", None)]


def test_activation_behind_a_shortcut_is_not_that_of_the_layer_before_it():
    model = randomized(SmallResNet())
    units = find_units(model, trace(model, images(1)), [], "layer")
    activations = {unit.name: unit.activation for unit in units}
    assert activations["layer1.0.conv2"] is None
