"""Layers that inherit from torch's and compute otherwise, each against the same written out or the class itself."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional

from baselines import quantize, summarize
from baselines.network.batch_norm_folding import folded_copy
from baselines.network.layer_subclasses import trials
from baselines.quantization.layers import QuantLayer

from ..networks import images, randomized


class SamePadding(nn.Conv2d):
    """Pads for itself, by a module of its own."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.pad = nn.ZeroPad2d((0, 1, 0, 1))

    def forward(self, x):
        return functional.conv2d(self.pad(x), self.weight, self.bias, self.stride)


class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight.flatten(1)
        weight = (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)
        return self._conv_forward(x, weight.view_as(self.weight), self.bias)


class Gained(nn.Conv2d):
    """Scales its weight by a parameter; there is no reason why a norm should not be folded into it."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(self.out_channels, 1, 1, 1))

    def forward(self, x):
        return self._conv_forward(x, self.weight * self.gain, self.bias)


class NormBefore(nn.Conv2d):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.norm = nn.GroupNorm(1, self.in_channels)

    def forward(self, x):
        return super().forward(self.norm(x))


class Rectified(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).relu()


class Casting(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight.to(x.dtype), self.bias)


KINDS = {
    "padding": (SamePadding, True),
    "standardised": (Standardised, False),
    "gained": (Gained, True),
    "norm-before": (NormBefore, True),
    "rectified": (Rectified, False),
    "casting": (Casting, True),
}


class Net(nn.Module):
    """A layer of `kind` between two plain ones, batch norm behind it."""

    def __init__(self, kind):
        super().__init__()
        self.stem, self.layer, self.norm = nn.Conv2d(3, 4, 3), kind(4, 6, 2), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        return self.head(self.norm(self.layer(self.stem(x).relu())).relu().mean((2, 3)))


@pytest.mark.parametrize(("kind", "folds"), KINDS.values(), ids=KINDS)
def test_norm_is_folded_only_where_the_output_scales_with_the_weight(kind, folds, caplog):
    model = randomized(Net(kind))
    folded = folded_copy(model, images(2))
    assert isinstance(folded.norm, nn.Identity) == folds and type(folded.layer) is kind
    torch.testing.assert_close(folded(images(5)), model(images(5)), rtol=1e-4, atol=1e-5)
    assert caplog.text == ""


@pytest.mark.parametrize(("kind", "folds"), KINDS.values(), ids=KINDS)
def test_own_forward_pass_runs_on_the_quantized_input_with_the_quantized_weight(kind, folds):
    """The reference is the class itself, called with weights on the grid and an input that was put on it by hand."""
    model = randomized(Net(kind))
    network = quantize(model, images(16), method="rtn", w_bits=3, a_bits=3)
    layer, plain = network.layer, kind(4, 6, 2)
    state = layer.state_dict()
    if plain.bias is not None:
        plain.load_state_dict({name: value for name, value in state.items() if "quantizer" not in name})
    x = network.stem(images(4)).relu()
    scale, zero_point = state["input_quantizer.scale"], state["input_quantizer.zero_point"]
    on_grid = (((x / scale).round() + zero_point).clamp(0, 7) - zero_point) * scale
    assert isinstance(layer, kind) and isinstance(layer, QuantLayer)
    torch.testing.assert_close(layer(x), plain(on_grid))
    assert all(len(channel.unique()) <= 8 for channel in layer.weight)
    summary = summarize(network)
    assert [(row.name, row.kind, row.weight_bits, row.input_bits) for row in summary.layers] == [
        ("stem", "Conv2d", 8, 32),
        ("layer", kind.__name__, 3, 3),
        ("head", "Linear", 8, 8),
    ]
    assert summary.floating_point.unquantized == ()


@pytest.mark.parametrize("kind", [kind for kind, _ in KINDS.values()], ids=KINDS)
@pytest.mark.parametrize("method", ["adaround", "qdrop"])
def test_roundings_of_a_subclass_are_learned(kind, method):
    options = {"w_bits": 3, "a_bits": 4, "batch_size": 16}
    nearest = quantize(randomized(Net(kind)), images(32), method="rtn", **options)
    learned = quantize(randomized(Net(kind)), images(32), method=method, iters=30, **options)
    step = nearest.layer.weight_quantizer.scale
    moved = ((learned.layer.weight - nearest.layer.weight) / step).round()
    assert moved.abs().max() == 1
    assert all(len(channel.unique()) <= 8 for channel in learned.layer.weight)


def test_quantized_subclasses_survive_copying_saving_and_exporting():
    network, file = quantize(randomized(Net(SamePadding)), images(8), method="rtn"), io.BytesIO()
    expected = network(images(3))
    torch.save(network, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(images(3)), expected)
    assert torch.equal(copy.deepcopy(network)(images(3)), expected)
    torch.testing.assert_close(torch.export.export(network, (images(3),)).module()(images(3)), expected)


class LowRank(nn.Linear):
    """A low-rank update that is merged at each call."""

    def __init__(self, *args):
        super().__init__(*args)
        self.a, self.b = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x):
        return functional.linear(x, self.weight + self.b @ self.a, self.bias)


def low_rank_network(kind):
    return randomized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), kind(144, 6), nn.Linear(6, 5)))


def test_weight_that_is_merged_at_call_becomes_a_plain_one():
    model = low_rank_network(LowRank)
    network = quantize(model, images(16), method="rtn", w_bits=8, a_bits=8)
    merged = model[3].weight + model[3].b @ model[3].a
    error = (network[3].weight - merged).abs().amax(1)
    assert (error <= 1.01 * merged.aminmax(dim=1).max.sub(merged.aminmax(dim=1).min) / 255).all()
    assert summarize(network).floating_point.unquantized == ()
    assert type(model[3]) is LowRank


class Doubled(LowRank):
    def forward(self, x):
        return 2 * super().forward(x)


class Forgetful(nn.Linear):
    """Has a weight that it does not use."""

    def __init__(self, *args):
        super().__init__(*args)
        self.inner = nn.Linear(*args)

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(("kind", "layers"), [(Doubled, ["0", "4"]), (Forgetful, ["0", "3.inner", "4"])])
def test_layer_that_computes_with_something_else_is_left_and_that_is_said(kind, layers, caplog):
    network = quantize(low_rank_network(kind), images(16), method="rtn")
    assert [row.name for row in summarize(network).layers] == layers
    assert "3" in summarize(network).floating_point.unquantized
    assert "they compute with something else than their weight: ['3']" in caplog.text


class Masked(nn.Conv2d):
    """Called with two tensors, gives two."""

    def forward(self, x, mask=None):
        x = super().forward(x if mask is None else x * mask)
        return x, mask


class WithMask(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.layer, self.head = nn.Conv2d(3, 4, 3), Masked(4, 6, 1), nn.Linear(6, 5)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.head(self.layer(mask=torch.ones_like(x), x=x)[0].mean((2, 3)))


@pytest.mark.parametrize("method", ["rtn", "qdrop"])
def test_layer_with_further_arguments_is_rounded_and_that_is_said(method, caplog):
    options = {"w_bits": 3, "a_bits": 3, "iters": 2, "range_method": "minmax"}
    model = randomized(WithMask())
    network = quantize(model, images(32), method=method, **options)
    highest = model.stem(images(32)).max().item()
    assert network.layer.input_quantizer.scale.item() == pytest.approx(highest / 7, rel=1e-3)  # not that of the mask
    assert [row.input_bits for row in summarize(network).layers] == [32, 3, 8]
    assert all(len(channel.unique()) <= 8 for channel in network.layer.weight)
    assert ("not called from one tensor and constants to one tensor: ['layer']" in caplog.text) == (method == "qdrop")


def test_what_a_subclass_computes_beside_its_own_product_is_said():
    class Beside(nn.Linear):
        def __init__(self, *args):
            super().__init__(*args)
            self.other = nn.Parameter(torch.randn(3, self.in_features))

        def forward(self, x):
            return super().forward(x) + functional.linear(x, self.other).sum(-1, keepdim=True)

    network = quantize(low_rank_network(Beside), images(16), method="rtn")
    assert summarize(network).floating_point.unquantized == ("linear in 3",)


def test_what_a_wide_standardised_layer_reads_is_seen():
    """It has so many weights that all of a channel are changed almost alike where each is changed a little more."""
    layer = Standardised(16, 8192, 1).requires_grad_(False)
    found = trials(nn.Sequential(layer), torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert found["0"].reads_weight and found["0"].merged is None
