import pytest
import torch
from torch import nn

from baselines.network.batch_norm_folding import folded_copy
from baselines.network.blocks import find_blocks
from baselines.network.trace import trace
from baselines.quantization.convert import quantized_copy, set_activation_ranges
from baselines.quantization.layers import quantized_layers
from baselines.quantization.quantizers import ActivationQuantizer
from baselines.quantization.specs import OFF, QuantSpec

from ..networks import SmallResNet, images, randomized


def converted(model, **bits):
    folded = folded_copy(model, images(2))
    record = trace(folded, images(2))
    return folded, quantized_copy(folded, record, find_blocks(folded, record), QuantSpec(**bits))


def test_bits_of_first_last_and_inner_layers():
    _, network = converted(randomized(SmallResNet()), w_bits=3, a_bits=2)
    layers = quantized_layers(network)
    bits = {name: layer.weight_quantizer.bits for name, layer in layers.items()}
    assert bits.pop("conv1") == bits.pop("fc") == 8
    assert set(bits.values()) == {3} and len(bits) == 5
    assert layers["conv1"].input_quantizer is None  # images are on a grid already
    assert layers["fc"].input_quantizer.bits == 8


def test_a_block_quantizes_its_input_once_for_all_readers():
    _, network = converted(randomized(SmallResNet()))
    block = network.layer1[1]
    assert isinstance(block.input_quantizer, ActivationQuantizer)
    assert block.conv1.input_quantizer is None and block.downsample[0].input_quantizer is None
    assert isinstance(block.conv2.input_quantizer, ActivationQuantizer)


def test_layers_that_read_one_tensor_share_a_quantizer():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.q, self.k = nn.Linear(192, 8), nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x):
            x = self.stem(x.flatten(1)).relu()
            return self.q(x) + self.k(x)

    _, network = converted(randomized(Heads()))
    assert network.q.input_quantizer is network.k.input_quantizer is not None


def test_other_readers_of_a_blocks_input_are_quantized_too():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.b(self.a(x).relu())

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(3, 4, 1), Block(), Block()
            self.skip, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 3)

        def forward(self, x):
            x = self.stem(x).relu()
            return self.fc((self.one(x) + self.two(x) + self.skip(x)).mean((2, 3)))

    _, network = converted(randomized(Branches()))
    assert network.one.input_quantizer is network.two.input_quantizer is network.skip.input_quantizer is not None
    assert network.one.a.input_quantizer is None


def test_layer_registered_under_two_names_is_replaced_under_both():
    class Alias(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)
            self.inner = self.mirror = nn.Conv2d(4, 4, 1)

        def forward(self, x):
            return self.fc(self.mirror(self.stem(x).relu()).mean((2, 3)))

    _, network = converted(randomized(Alias()))
    assert network.inner is network.mirror and network.mirror.weight_quantizer is not None


class Twice(nn.Module):
    """Gives its input to both sides of a bilinear layer."""

    def __init__(self):
        super().__init__()
        self.bilinear = nn.Bilinear(8, 8, 8)

    def forward(self, x):
        return self.bilinear(x, x)


class Positions(nn.Module):
    """Adds an embedding."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 8)

    def forward(self, x):
        return x + self.table(torch.arange(8))


def with_own_forward():
    layer = nn.Conv2d(4, 4, 1)
    layer.forward = lambda x: x
    return layer


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: nn.ConvTranspose2d(4, 4, 1), "1"),
        (with_own_forward, "1"),
        (Twice, "1.bilinear"),
        (Positions, "1.table"),
    ],
    ids=["transposed", "own-forward", "bilinear", "embedding"],
)
def test_what_stays_in_floating_point_is_said(make, name, caplog):
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), make(), nn.Flatten(), nn.Linear(256, 3)))
    _, network = converted(model)
    assert type(network[1]) is type(model[1])
    assert "left in floating point" in caplog.text and f"['{name}']" in caplog.text


@pytest.mark.parametrize(("w_bits", "a_bits"), [(OFF, 4), (4, OFF)])
def test_either_side_can_be_left_in_floating_point(w_bits, a_bits):
    _, network = converted(randomized(SmallResNet()), w_bits=w_bits, a_bits=a_bits)
    has_weights = {layer.weight_quantizer is not None for layer in quantized_layers(network).values()}
    has_inputs = any(isinstance(m, ActivationQuantizer) for m in network.modules())
    assert (has_weights, has_inputs) == ({w_bits != OFF}, a_bits != OFF)


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ValueError, match="has no layer to quantize"):
        converted(randomized(nn.Sequential(nn.Flatten(), nn.LayerNorm(192))))


def test_ranges_see_the_extremes_of_every_batch():
    model = randomized(SmallResNet())
    folded, network = converted(model, a_bits=8)
    inputs = images(6)
    inputs[5] *= 20
    spec = QuantSpec(a_bits=8, range_method="minmax")
    generator = torch.Generator().manual_seed(0)
    set_activation_ranges(folded, network, inputs, spec, batch_size=4, generator=generator, budget=12)
    with torch.no_grad():
        stem = folded.relu(folded.conv1(inputs))
    assert network.layer1[0].input_quantizer.scale.item() == pytest.approx(stem.max().item() / 255, rel=1e-5)
