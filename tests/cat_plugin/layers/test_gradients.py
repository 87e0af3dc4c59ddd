import copy

import pytest
import torch
from torch import nn

from baselines import quantize
from baselines.quantization.quantizers import ActivationQuantizer
from cat_plugin.layers.gradients import fitting_through
from tests.cat_plugin.helpers import state_of
from tests.cat_plugin.layers.networks import Net, Rounded, pictures, planted

QUANTIZERS = {
    "methods": lambda x, s, top: (x / s).round().clamp(0, top) * s,
    "functions": lambda x, s, top: torch.clamp(torch.round(x / s), min=0, max=top) * s,
    "in place": lambda x, s, top: (x / s).round_().clamp_(0, top).mul_(s),
    "functions in place": lambda x, s, top: torch.clamp_(torch.round_(x / s), 0, top) * s,
    "clip": lambda x, s, top: torch.clip((x / s).round(), 0, top) * s,
    "one limit after the other": lambda x, s, top: (x / s).round().clamp(min=0).clamp(max=top) * s,
    "minimum and maximum": lambda x, s, top: (
        torch.minimum((x / s).round().maximum(torch.tensor(0.0)), torch.tensor(float(top))) * s
    ),
    "floor": lambda x, s, top: (x / s + 0.5).floor().clamp(0, top) * s,
    "ceil": lambda x, s, top: (x / s - 0.5).ceil().clamp(0, top) * s,
    "limits first": lambda x, s, top: (x / s).clamp(-0.499, top + 0.499).round() * s,
}
TABLE = [(-1.0, 0), (-0.2, 1), (0.0, 1), (0.4, 1), (1.3, 1), (1.5, 1), (1.7, 1), (2.0, 0), (9.0, 0)]
"""Inputs of a quantizer to 0, .5, 1, 1.5, and the gradients there: 1 at the ends of the range, too."""


@pytest.mark.parametrize("quantizer", QUANTIZERS.values(), ids=QUANTIZERS)
def test_gradient_of_quantizers(quantizer):
    x = torch.tensor([value for value, _ in TABLE], requires_grad=True)
    expected = quantizer(x.detach().clone(), 0.5, 3)
    with fitting_through(nn.Identity()):
        out = quantizer(x, 0.5, 3)
        (gradient,) = torch.autograd.grad((out * torch.arange(1.0, 1 + len(x))).sum(), x)
    assert torch.equal(out, expected)
    assert gradient.tolist() == [(place + 1) * slope for place, (_, slope) in enumerate(TABLE)]


def test_rounding_has_no_gradient_outside_of_the_block():
    x = torch.tensor([0.3, 0.8], requires_grad=True)
    with fitting_through(nn.Identity()):
        pass
    x.round().sum().backward()
    assert x.grad.tolist() == [0, 0]


def test_limits_that_are_fitted_keep_their_own_gradients():
    x, top = torch.tensor([1.0, 3.0], requires_grad=True), torch.tensor(2.0, requires_grad=True)
    with fitting_through(nn.Identity()):
        gradients = torch.autograd.grad(x.clamp(torch.tensor(0.0), top).sum(), (x, top))
    assert [gradient.tolist() for gradient in gradients] == [[1, 0], 1]


def test_a_network_without_roundings_has_its_usual_gradients():
    model, x = Net(rounding=nn.Identity).eval(), pictures(4).requires_grad_()
    (expected,) = torch.autograd.grad(model(x).square().sum(), x)
    with fitting_through(model):
        (found,) = torch.autograd.grad(model(x).square().sum(), x)
    assert torch.equal(found, expected)


class InPlace(Rounded):
    def forward(self, x):
        return (x / self.scale).round_().clamp_(0, self.levels).mul_(self.scale)


def low_bit(method="rtn"):
    fp = Net(rounding=nn.Identity).eval()
    return quantize(copy.deepcopy(fp), pictures(32), method=method, w_bits=4, a_bits=2).eval()


MODELS = {"plain": lambda: planted()[0], "in place": lambda: planted(rounding=InPlace)[0], "baselines": low_bit}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_values_stay_the_same(make):
    model, x = make(), pictures(16)
    with torch.no_grad():
        expected = model(x)
    with fitting_through(model):
        assert torch.equal(model(x.clone().requires_grad_()), expected)
    with torch.no_grad():
        assert torch.equal(model(x), expected)


def gradient_of_input(model, x):
    x = x.clone().requires_grad_()
    with fitting_through(model):
        return torch.autograd.grad(model(x).square().sum(), x)[0]


def test_quantizers_that_know_how_have_the_same_gradients_as_roundings(monkeypatch):
    model, x = low_bit(), pictures(16)
    told = gradient_of_input(model, x)
    monkeypatch.delattr(ActivationQuantizer, "cat_straight_through")
    found = gradient_of_input(model, x)
    assert told.abs().sum() > 0
    torch.testing.assert_close(found, told, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True], ids=["normal", "raises"])
def test_parameters_are_as_before(fails):
    model = low_bit()
    model.first.bias.requires_grad_(False)
    model.last.weight.requires_grad_(True).grad = torch.ones_like(model.last.weight)
    before = state_of(model)
    vector = torch.zeros(5, requires_grad=True)
    try:
        with fitting_through(model):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            (model(pictures(4)) + vector).sum().backward()
            if fails:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        assert fails
    assert state_of(model) == before
    assert vector.grad.tolist() == [4.0] * 5


def test_inside_of_inference_mode():
    model = planted()[0]
    with torch.inference_mode(), fitting_through(model):
        assert gradient_of_input(model, pictures(2)).abs().sum() > 0
