import pytest
import torch
from torch import nn
from torch.nn import functional

from baselines import quantize, summarize
from baselines.network.edges import Edges, find_edges

from ..networks import LongSkip, SmallResNet, images, randomized


def edges(first, last, fed_images=None):
    fed_images = first if fed_images is None else fed_images
    return Edges(first=frozenset(first), last=frozenset(last), fed_images=frozenset(fed_images))


class Net(nn.Module):
    """Convolutions on images, named by letter, and linear layers on eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 8, 3, padding=1) for _ in range(2))
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.h, self.i = (nn.Linear(8, 5) for _ in range(2))
        self.mean, self.projection = nn.Parameter(torch.zeros(3, 1, 1)), nn.Parameter(torch.randn(5, 5))


class Heads(Net):
    def forward(self, x):
        x = self.c(self.a(x - self.mean).relu()).mean((2, 3))
        return {"main": self.h(x).softmax(-1), "auxiliary": [self.i(x)]}


class AveragedHeads(Net):
    def forward(self, x):
        x = self.c(self.a(x).relu()).mean((2, 3))
        return (self.i(x) + self.h(x)) / 2


class Stems(Net):
    def forward(self, x):
        half = functional.avg_pool2d(x, 2)
        x = self.a(x) + functional.interpolate(self.b(half), scale_factor=2.0)
        return self.h(self.c(x.relu_()).mean((2, 3)))


class HeadReadAgain(Net):
    """What the first head gives is an output, and read by another layer."""

    def forward(self, x):
        first = self.h(self.c(self.a(x)).mean((2, 3)))
        return first, self.i(functional.pad(first, (0, 3)))


class WrittenInto(Net):
    def forward(self, x):
        x = self.c(self.a(x)).mean((2, 3))
        out = torch.zeros(len(x), 2, 5)
        out[:, 0] = self.h(x)
        out[:, 1].copy_(self.i(x).detach())
        return out


class WithoutGradients(Net):
    def forward(self, x):
        with torch.no_grad():
            return self.h(self.c(self.a(x.detach())).mean((2, 3)))


class ProjectedByParameter(Net):
    """A product with a parameter is the last layer, though none that is quantized."""

    def forward(self, x):
        return self.h(self.c(self.a(x)).mean((2, 3))) @ functional.normalize(self.projection).T


class ImagesAmongFeatures(Net):
    def forward(self, x):
        x = self.c(torch.cat([self.a(x)[:, :5], x], 1))
        return self.h(x.mean((2, 3)))


class CalledLastGivesNothing(Net):
    def forward(self, x):
        out = self.h(self.c(self.a(x)).mean((2, 3)))
        self.i(out.new_zeros(1, 8))
        return out


class Transposed(Net):
    """A layer that is not quantized is one, too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(3, 3, 2, 2)

    def forward(self, x):
        return self.h(self.c(self.a(self.up(x))).mean((2, 3)))


class CalledTwice(Net):
    def forward(self, x):
        return self.h(self.c(self.a(self.a(x)[:, :3])).mean((2, 3)))


EXPECTED = [
    (Heads, edges("a", "hi")),
    (AveragedHeads, edges("a", "hi")),
    (Stems, edges("ab", "h")),
    (HeadReadAgain, edges("a", "hi")),
    (WrittenInto, edges("a", "hi")),
    (WithoutGradients, edges("a", "h")),
    (ProjectedByParameter, edges("a", "")),
    (ImagesAmongFeatures, edges("a", "h")),
    (CalledLastGivesNothing, edges("a", "h")),
    (Transposed, edges(["up"], "h")),
    (CalledTwice, edges("a", "h", fed_images="")),
    (SmallResNet, edges(["conv1"], ["fc"])),
    (LongSkip, edges("a", ["fc"])),
]


@pytest.mark.parametrize(("build", "expected"), EXPECTED, ids=[build.__name__ for build, _ in EXPECTED])
def test_first_and_last_layers(build, expected):
    model = randomized(build())
    assert find_edges(model, images(2)) == expected
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.filterwarnings("ignore")
def test_scripted_functions_hand_on_where_values_come_from():
    @torch.jit.script
    def scripted(x):
        return x.relu() + 1

    class Scripted(Net):
        def forward(self, x):
            return scripted(self.h(self.c(self.a(scripted(x))).mean((2, 3))))

    assert find_edges(randomized(Scripted()), images(2)) == edges("a", "h")


@pytest.mark.parametrize("build", [Heads, AveragedHeads, HeadReadAgain])
def test_heads_have_eight_bits_whatever_the_order_of_calls(build):
    network = quantize(randomized(build()), images(16), method="rtn", w_bits=2, a_bits=2, batch_size=8)
    rows = {row.name: (row.weight_bits, row.input_bits) for row in summarize(network).layers}
    assert rows == {"a": (8, 32), "c": (2, 2), "h": (8, 8), "i": (8, 8)}
    assert network.h.input_quantizer.bits == network.i.input_quantizer.bits == 8


def test_stems_have_eight_bits_and_read_plain_images():
    network = quantize(randomized(Stems()), images(16), method="rtn", w_bits=2, a_bits=2, batch_size=8)
    rows = {row.name: (row.weight_bits, row.input_bits) for row in summarize(network).layers}
    assert rows == {"a": (8, 32), "b": (8, 32), "c": (2, 2), "h": (8, 8)}
    assert network.a.input_quantizer is network.b.input_quantizer is None


class Block(nn.Module):
    """`early` is a head, so that it needs other bits than `inner`, which reads the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.early = nn.Linear(8, 8), nn.Linear(8, 8)
        self.outer = nn.Linear(8, 8)

    def forward(self, x):
        return self.early(x) + self.outer(self.inner(x).relu())


class HeadInABlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block = nn.Linear(192, 8), Block()

    def forward(self, x):
        return self.block(self.stem(x.flatten(1)).relu())


def test_a_quantizer_is_split_where_readers_of_a_blocks_input_need_other_bits():
    network = quantize(randomized(HeadInABlock()), images(16), method="rtn", w_bits=4, a_bits=2, blocks=["block"])
    rows = {row.name: (row.weight_bits, row.input_bits) for row in summarize(network).layers}
    assert rows == {"stem": (8, 32), "block.inner": (4, 2), "block.early": (8, 8), "block.outer": (8, 8)}
    seen = {}
    for name in ("inner", "early"):
        layer = getattr(network.block, name)
        layer.register_forward_hook(lambda m, args, out, name=name: seen.update({name: m.input_quantizer(args[0])}))
    network(images(200))
    assert len(seen["inner"].unique()) <= 4 < len(seen["early"].unique())


def test_summary_tells_the_bits_of_the_quantizer_that_acts():
    network = quantize(randomized(SmallResNet()), images(16), method="rtn", w_bits=4, a_bits=3)
    network.layer1[1].input_quantizer.bits = 5  # of which the layers themselves know nothing
    rows = {row.name: row.input_bits for row in summarize(network).layers}
    assert rows["layer1.1.conv1"] == rows["layer1.1.downsample.0"] == 5 and rows["layer1.1.conv2"] == 3
