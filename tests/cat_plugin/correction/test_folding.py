import copy

import pytest
import torch
from torch import nn

from baselines.quantization.layers import quantized_twin
from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer
from cat_plugin import CATWrapper, ChannelAffine, ClusterAffine
from cat_plugin.correction.folding import fold_into
from tests.cat_plugin.helpers import state_of


class WeightScale(nn.Module):
    """Rounds weights to 4 bits at the scale of their channel, or at one for all."""

    def __init__(self, weight, per_channel=True):
        super().__init__()
        largest = weight.detach().abs().flatten(1).amax(1) if per_channel else weight.detach().abs().max().view(1)
        self.register_buffer("scale", (largest / 7).view(-1, *[1] * (weight.ndim - 1)))

    def integers(self, weight):
        return (weight / self.scale).round().clamp(-8, 7)

    def forward(self, weight):
        return self.integers(weight) * self.scale


class FakeQuantized:
    """Mixed into torch's layers: weights are rounded in every forward pass."""

    def prepare(self, per_channel=True, output=None):
        self.weight_quantizer, self.output = WeightScale(self.weight, per_channel), output
        return self

    def forward(self, x):
        weight = self.weight_quantizer(self.weight)
        product = self._conv_forward if weight.ndim > 2 else nn.functional.linear
        out = product(x, weight, self.bias)
        return out if self.output is None else self.output(out)


class FakeConv(FakeQuantized, nn.Conv2d):
    pass


class FakeLinear(FakeQuantized, nn.Linear):
    pass


def of_baselines(layer):
    twin = quantized_twin(layer)
    twin.weight_quantizer = WeightQuantizer(layer.weight, 4)
    twin.input_quantizer = ActivationQuantizer(8)
    twin.input_quantizer.set_range(torch.randn(1000))
    twin.harden()
    return twin


FOLDED = {
    "linear": lambda: nn.Linear(6, 4),
    "linear without bias": lambda: nn.Linear(6, 4, bias=False),
    "conv": lambda: nn.Conv2d(6, 4, 3, padding=1),
    "conv without bias": lambda: nn.Conv2d(6, 4, 3, stride=2, bias=False),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "depthwise": lambda: nn.Conv2d(6, 6, 3, groups=6, dilation=2),
    "baselines linear": lambda: of_baselines(nn.Linear(6, 4)),
    "baselines conv": lambda: of_baselines(nn.Conv2d(6, 4, 3, bias=False)),
    "fake-quantized conv": lambda: FakeConv(6, 4, 3).prepare(),
    "fake-quantized conv without bias": lambda: FakeConv(6, 4, 3, bias=False).prepare(),
    "fake-quantized depthwise": lambda: FakeConv(6, 6, 3, groups=6).prepare(),
    "fake-quantized linear": lambda: FakeLinear(6, 4).prepare(),
}
LEFT = {
    "quantizes its output": lambda: FakeConv(6, 4, 3).prepare(output=lambda out: (out * 4).round() / 4),
    "one scale for all channels": lambda: FakeConv(6, 4, 3).prepare(per_channel=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 4, 3),
    "attention": lambda: nn.MultiheadAttention(6, 2),
    "never called by attention": lambda: nn.MultiheadAttention(6, 2).out_proj,
    "norm": lambda: nn.BatchNorm2d(6),
}


def change(layer, negative=False):
    channels = getattr(layer, "out_channels", None) or getattr(layer, "out_features", None) or 6
    generator = torch.Generator().manual_seed(0)
    scale = 0.5 + torch.rand(channels, generator=generator)
    scale[0] *= -1 if negative else 1
    axis = -3 if getattr(layer, "weight", torch.zeros(1)).ndim > 2 else -1
    return ChannelAffine(scale, torch.randn(channels, generator=generator), axis)


def inputs(layer):
    return torch.randn(5, 6, 9, 9) if layer.weight.ndim > 2 else torch.randn(5, 6)


@pytest.mark.parametrize("make", FOLDED.values(), ids=FOLDED)
def test_folded_layers_give_what_hooked_ones_do(make):
    layer = make().eval()
    x, correction = inputs(layer), change(layer)
    before = state_of(layer)
    folded = fold_into(layer, correction)
    with torch.no_grad():
        expected = correction(layer(x))
        torch.testing.assert_close(folded(x), expected, rtol=1e-5, atol=1e-5)
        assert (expected - layer(x)).abs().max() > 0.1
    assert state_of(layer) == before and type(folded) is type(layer)
    assert not {p.data_ptr() for p in folded.parameters() if p.numel() > 1} & {p.data_ptr() for p in layer.parameters()}


@pytest.mark.parametrize("name", ["linear", "conv", "baselines conv"])
def test_what_folds_folds_in_mixed_precision(name):
    layer = FOLDED[name]().eval()
    expected = fold_into(layer, change(layer))
    with torch.autocast("cpu", torch.bfloat16):
        folded = fold_into(layer, change(layer))
    assert torch.equal(folded.weight, expected.weight) and torch.equal(folded.bias, expected.bias)


@pytest.mark.parametrize("make", [FOLDED[name] for name in FOLDED if name.startswith("fake")])
def test_integers_of_plain_fake_quantizers_stay(make):
    layer = make()
    folded = fold_into(layer, change(layer))
    before, after = (each.weight_quantizer.integers(each.weight) for each in (layer, folded))
    assert torch.equal(before, after) and len(before.unique()) > 8
    scale = change(layer).scale.view_as(layer.weight_quantizer.scale)
    torch.testing.assert_close(folded.weight_quantizer.scale, layer.weight_quantizer.scale * scale)


@pytest.mark.parametrize("make", [FOLDED[name] for name in FOLDED if name.startswith("baselines")])
def test_integers_of_baselines_stay(make):
    layer = make()
    folded = fold_into(layer, change(layer))

    def integers(each):
        return each.weight / each.weight_quantizer.scale + each.weight_quantizer.zero_point

    torch.testing.assert_close(integers(folded), integers(layer).round(), rtol=0, atol=1e-3)
    assert torch.equal(folded.weight_quantizer.zero_point, layer.weight_quantizer.zero_point)


@pytest.mark.parametrize("make", [FOLDED[name] for name in FOLDED if name.startswith("fake")])
def test_scales_that_change_the_sign(make):
    """Exact or not at all."""
    layer = make()
    correction, x = change(layer, negative=True), inputs(layer)
    folded = fold_into(layer, correction)
    if folded is not None:
        with torch.no_grad():
            torch.testing.assert_close(folded(x), correction(layer(x)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", LEFT.values(), ids=LEFT)
def test_layers_that_cannot_be_folded(make):
    layer = make().eval()
    before = state_of(layer)
    assert fold_into(layer, change(layer)) is None
    assert state_of(layer) == before


def test_unfolded_layers_are_named_and_corrected(caplog):
    model = nn.Sequential(FOLDED["fake-quantized conv"](), LEFT["quantizes its output"]().eval()).eval()
    model[1] = FakeConv(4, 4, 3).prepare(output=lambda out: (out * 4).round() / 4)
    model.append(nn.Flatten()).append(nn.Linear(100, 3))
    model.eval()
    x = torch.randn(5, 6, 9, 9)
    before = state_of(model)
    layers = {"0": change(model[0]), "1": change(model[1]), "3": change(model[3])}
    cat_model = CATWrapper(model, ClusterAffine.identity(3), layers=layers)
    with torch.no_grad():
        expected, baked = model(x), cat_model.bake(fold=True)
        torch.testing.assert_close(baked(x), expected, rtol=1e-4, atol=1e-4)
        assert baked.unfolded == ("1",) and "1 layers are not folded: 1" in caplog.text
        assert set(cat_model.bake().unfolded) == set(layers)
        copied = copy.deepcopy(baked)
        assert torch.equal(copied(x), baked(x))
    cat_model.remove()
    assert state_of(model) == before


class CoarseInput(nn.Linear):
    """Rounds its input by steps of 8, and its weight by one scale for all channels."""

    def forward(self, x):
        step = self.weight.abs().max()
        return nn.functional.linear((x / 8).round() * 8, (self.weight / step).round() * step, self.bias)


def test_layers_that_round_small_inputs_to_nothing_are_tried_on_large_ones():
    torch.manual_seed(0)
    layer = CoarseInput(6, 4)
    correction = ChannelAffine(torch.tensor([0.5, 1.0, 1.5, 2.0]), torch.zeros(4), -1)
    assert fold_into(layer, correction) is None


def test_probes_leave_no_trace():
    """Of a layer in training mode that counts its passes."""

    class Counting(nn.Linear):
        def __init__(self):
            super().__init__(6, 4)
            self.register_buffer("passes", torch.zeros(()))

        def forward(self, x):
            self.passes += 1
            return super().forward(x)

    layer = Counting().train()
    fold_into(layer, ChannelAffine(torch.ones(4), torch.zeros(4), -1))
    assert layer.passes == 0 and layer.training
