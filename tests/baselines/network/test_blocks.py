import pytest
import torch
import torchvision
from torch import nn

from baselines.network.blocks import find_blocks, named_blocks
from baselines.network.trace import trace

from ..networks import SmallResNet, images, randomized


def blocks_of(model, size=32):
    model.eval()
    x = images(1, size=size)
    return find_blocks(model, trace(model, x))


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


class AttentionBlock(nn.Module):
    """A residual block, each of whose branches could be a block by itself."""

    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x).relu())

    def __init__(self):
        super().__init__()
        self.mix, self.mlp = self.Branch(), self.Branch()

    def forward(self, x, mask=None):
        x = x + self.mix(x)
        return x + self.mlp(x)


class Attributes(nn.Module):
    """Blocks that are attributes, not elements of a Sequential."""

    def __init__(self, *call):
        super().__init__()
        self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), AttentionBlock(), AttentionBlock()
        self.position, self.head, self.call = nn.Parameter(torch.zeros(1, 64, 4)), nn.Linear(4, 2), call

    def forward(self, x):
        x = self.stem(x).flatten(2).mT + self.position
        return self.head(self.two(self.one(x, *self.call), *self.call).mean(1))


def test_residual_blocks_are_preferred_to_their_branches():
    assert blocks_of(Attributes(), size=8) == ["one", "two"]


def test_defaults_spelled_out_do_not_matter_but_other_arguments_do():
    assert blocks_of(Attributes(None), size=8) == ["one", "two"]
    inner = ["one.mix", "one.mlp", "two.mix", "two.mlp"]
    assert blocks_of(Attributes(torch.ones(1)), size=8) == inner


def test_mlps_that_are_a_sequential_of_their_own_class_are_blocks():
    model = nn.Sequential(nn.Flatten(), torchvision.ops.MLP(192, [8, 8]), torchvision.ops.MLP(8, [6, 4]))
    assert blocks_of(model, size=8) == ["1", "2"]
    assert blocks_of(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(192, 8), nn.Linear(8, 4))), size=8) == []


def test_transformer_layers_of_torch_are_blocks():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
            self.stem, self.encoder = nn.Conv2d(3, 4, 4, 4), nn.TransformerEncoder(layer, 2)

        def forward(self, x):
            return self.encoder(self.stem(x).flatten(2).mT).mean(1)

    assert blocks_of(Encoder(), size=8) == ["encoder.layers.0", "encoder.layers.1"]


def named(model, names):
    model.eval()
    return named_blocks(model, trace(model, images(2)), names)


def test_users_name_blocks_in_any_order():
    model = randomized(SmallResNet())
    assert named(model, ["layer1.1", "layer1.0"]) == ["layer1.0", "layer1.1"]
    assert named(model, ["layer1"]) == ["layer1"]
    assert named(model, []) == []


class TwoOutputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.unused, self.fc = nn.Sequential(nn.Linear(192, 4)), nn.Linear(2, 2), nn.Linear(4, 3)
        self.pair = nn.Module()
        self.pair.fc, self.pair.forward = nn.Linear(4, 4), lambda x, y: self.pair.fc(x + y)
        self.split = nn.Module()
        self.split.fc, self.split.forward = nn.Linear(4, 4), lambda x: (self.split.fc(x), x)
        self.twice = nn.Sequential(nn.Linear(4, 4))

    def forward(self, x):
        x = self.body(x.flatten(1))
        return self.fc(self.twice(self.twice(sum(self.split(self.pair(x, x))))))


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ("body", TypeError, "blocks='body' should be a list of module names"),
        ([3], TypeError, r"blocks=\[3\] should be"),
        (["bodi"], ValueError, "'bodi', but TwoOutputs has no such module; close to it: body"),
        ([""], ValueError, "no such module; give names as in model.named_modules"),
        (["body", "body"], ValueError, "'body' and 'body', which overlap"),
        (["body", "body.0"], ValueError, r"'body' and 'body\.0', which overlap"),
        (["fc"], ValueError, r"'fc' \(Linear\), which holds no layer to quantize"),
        (["pair"], ValueError, r"'pair' \(Module\), which is called with 2 tensors"),
        (["split"], ValueError, "'split' .* giving something else than one tensor"),
        (["twice"], ValueError, "'twice' .* called 2 times"),
    ],
)
def test_blocks_that_cannot_be_used_are_clear_errors(names, error, message):
    with pytest.raises(error, match=message):
        named(TwoOutputs(), names)
