import pytest
import torch
from torch import nn

from baselines.network.blocks import find_blocks
from baselines.network.trace import trace
from baselines.network.units import find_units, per_image

from ..networks import SmallResNet, images, randomized


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


def test_a_module_called_twice_is_no_unit():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 1), nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(self.conv(self.conv(x)).mean((2, 3)))

    model = Twice().eval()
    assert [u.name for u in find_units(model, trace(model, images(1)), [], "layer")] == ["fc"]


class Called(nn.Module):
    """A block that is called in some way."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x, times=1, hook=len):
            x = x[0] if isinstance(x, list) else x
            return self.b(self.a(x)) * (times if isinstance(times, (int, float, torch.Tensor)) else 1)

    def __init__(self, call):
        super().__init__()
        self.block, self.call = self.Block(), call

    def forward(self, x):
        return self.call(self.block, x).mean((2, 3))


def blocks_confirmed(model, confirmed=True):
    model.eval()
    record = trace(model, images(2, seed=1)).confirmed_by(trace(model, images(4, seed=2)) if confirmed else None)
    return [u.name for u in find_units(model, record, find_blocks(model, record), "block")]


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x, 3),
        lambda block, x: block(x, times=0.5),
        lambda block, x: block(x=x),
        lambda block, x: block(x, hook=len),
        lambda block, x: block(x, x.shape[2:]),
        lambda block, x: block(x, times=(None, ("way", 2))),
    ],
    ids=["number", "named number", "named tensor", "default", "sizes", "nested"],
)
def test_constants_beside_the_tensor_do_not_matter(call):
    assert blocks_confirmed(Called(call)) == ["block"]
    assert blocks_confirmed(Called(call), confirmed=False) == ["block.a", "block.b"]


@pytest.mark.parametrize(
    "call",
    [
        lambda block, x: block(x, len(x)),
        lambda block, x: block(x, x.shape),
        lambda block, x: block(x, x.mean().item()),
        lambda block, x: block(x, x.mean()),
        lambda block, x: block(x, hook=lambda: None),
        lambda block, x: block([x]),
        lambda block, x: block(x, {}),
        lambda block, x: block(x, **({"times": 2} if len(x) == 2 else {})),
        lambda block, x: block(x, 1 if len(x) == 2 else True),
    ],
    ids=["images", "shape", "value", "two tensors", "function", "list", "dict", "not always", "type"],
)
def test_blocks_called_with_what_may_vary_or_be_written_into_are_no_blocks(call):
    assert blocks_confirmed(Called(call)) == ["block.a", "block.b"]


def test_unit_that_the_other_images_do_not_reach_is_left(caplog):
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.Linear(4, 2)).eval()
    record, other = trace(model, images(2)), trace(model, images(4))
    other.calls = [call for call in other.calls if call.name != "1"]
    units = find_units(model, record, [], "layer")
    assert [u.name for u in per_image(units, (2, record), (4, other))] == ["2"]
    assert "do not have one row" in caplog.text and "['1']" in caplog.text


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


class Gated(nn.Module):
    """What ``gate`` reads, a function reads, too."""

    def __init__(self, how):
        super().__init__()
        self.conv, self.gate, self.fc, self.how = nn.Conv2d(3, 4, 1), nn.Sigmoid(), nn.Linear(4, 3), how

    def forward(self, x):
        x = self.conv(x)
        if self.how == "operator":
            x = x * self.gate(x)
        elif self.how == "boolean":
            x = torch.where(x > 0, self.gate(x), 0.0)
        elif self.how == "assignment":
            kept = torch.zeros(x.shape)
            kept[:] = x
            x = self.gate(x) + kept
        else:
            x = self.gate(x) * x.shape[0]
        return self.fc(x.mean((2, 3)))


@pytest.mark.parametrize(
    ("how", "activation"), [("operator", None), ("boolean", None), ("assignment", None), ("shape", "gate")]
)
def test_activation_beside_a_function_that_reads_the_same_is_not_part_of_the_unit(how, activation):
    model = Gated(how).eval()
    units = find_units(model, trace(model, images(1)), [], "layer")
    assert [(unit.name, unit.activation) for unit in units] == [("conv", activation), ("fc", None)]


def test_activation_behind_a_shortcut_is_not_that_of_the_layer_before_it():
    model = randomized(SmallResNet())
    units = find_units(model, trace(model, images(1)), [], "layer")
    activations = {unit.name: unit.activation for unit in units}
    assert activations["layer1.0.conv2"] is None


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


def test_channels_moved_behind_the_batch_are_where_the_error_is_summed():
    class Moved(AttentionBlock):
        def forward(self, x):
            return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Moved(), nn.Flatten(), nn.Linear(256, 2)).eval()
    record = trace(model, images(1))
    units = find_units(model, record, find_blocks(model, record), "block")
    assert [(unit.name, unit.channel_axis) for unit in units] == [("0", 1), ("1", 1), ("3", -1)]


def test_units_without_rows_for_each_image_are_left_out_and_that_is_said(caplog):
    class Axes(nn.Module):
        def __init__(self):
            super().__init__()
            self.windows, self.tokens, self.table = nn.Linear(12, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.fc = nn.Linear(4, 2)
            self.register_buffer("constant", torch.ones(6, 4))

        def forward(self, x):
            x = self.windows(x.reshape(-1, 12)).view(len(x), 16, 4)  # 16 rows an image
            x = self.tokens(x.transpose(0, 1)).transpose(0, 1)  # the batch is the second axis
            return self.fc(x.mean(1) + self.table(self.constant).mean(0))

    model = Axes().eval()
    passes = [(count, trace(model, images(count))) for count in (2, 3)]
    units = find_units(model, passes[0][1], [], "layer")
    assert [unit.name for unit in per_image(units, *passes)] == ["windows", "fc"]
    assert "['tokens', 'table']" in caplog.text
    assert [unit.name for unit in per_image(units, *passes, one_row=True)] == ["fc"]
