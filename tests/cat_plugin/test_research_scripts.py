"""Quantizers as research scripts (BRECQ, QDrop, PD-Quant, MQBench) write them: wrappers put into the model in place."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

from cat_plugin import CATError, apply_cat

from .helpers import SmallNet, images, state_of

INPUTS = images(600)


class UniformQuantizer(nn.Module):
    """Range taken from the first tensor that it sees, as those scripts do."""

    def __init__(self, bits):
        super().__init__()
        self.levels, self.inited, self.delta, self.zero_point = 2**bits, False, 1.0, 0.0

    def forward(self, x):
        if not self.inited:
            low, high = x.min().clamp(max=0), x.max().clamp(min=0)
            self.delta = nn.Parameter((high - low) / (self.levels - 1))
            self.zero_point, self.inited = (-low / self.delta).round(), True
        grid = ((x / self.delta).round() + self.zero_point).clamp(0, self.levels - 1)
        return (grid - self.zero_point) * self.delta


class QuantModule(nn.Module):
    """A linear layer whose weight and output are quantized once `set_quant_state` asks for it."""

    def __init__(self, original, weight_bits, act_bits):
        super().__init__()
        self.weight, self.bias, self.org_weight = original.weight, original.bias, original.weight.data.clone()
        self.weight_quantizer, self.act_quantizer = UniformQuantizer(weight_bits), UniformQuantizer(act_bits)
        self.use_weight_quant = self.use_act_quant = False

    def forward(self, x):
        weight = self.weight_quantizer(self.weight) if self.use_weight_quant else self.org_weight
        out = functional.linear(x, weight, self.bias)
        return self.act_quantizer(out) if self.use_act_quant else out


class QuantModel(nn.Module):
    """Holds the model that it was given, in which every linear layer has been replaced."""

    def __init__(self, model, weight_bits=2, act_bits=4):
        super().__init__()
        self.model = model
        for name, child in list(model.named_children()):
            if isinstance(child, nn.Linear):
                setattr(model, name, QuantModule(child, weight_bits, act_bits))

    def set_quant_state(self, weight_quant=False, act_quant=False):
        for module in self.modules():
            if isinstance(module, QuantModule):
                module.use_weight_quant, module.use_act_quant = weight_quant, act_quant

    def forward(self, x):
        return self.model(x)


def quantized(model):
    """As those scripts go: wrap, switch quantization on, and let one batch set the ranges."""
    quant_model = QuantModel(model).eval()
    quant_model.set_quant_state(True, True)
    with torch.no_grad():
        quant_model(INPUTS[:64])
    return quant_model


def test_a_model_quantized_in_place_is_refused():
    fp = SmallNet().eval()
    with pytest.raises(CATError, match=r"shares .* with fp_model.*in place; quantize a copy\.deepcopy of it"):
        apply_cat(quantized(fp), fp, INPUTS)


def test_one_model_in_both_states_is_refused():
    quant_model = quantized(SmallNet().eval())
    with pytest.raises(CATError, match=r"same object.*copy\.deepcopy"):
        apply_cat(quant_model, quant_model, INPUTS)


def test_ranges_that_are_still_to_be_set_are_refused():
    fp = SmallNet().eval()
    quant_model = QuantModel(copy.deepcopy(fp)).eval()
    quant_model.set_quant_state(True, True)
    with pytest.raises(CATError, match=r"changed model\.first\.act_quantizer\.delta.*Freeze observers"):
        apply_cat(quant_model, fp, INPUTS)


def test_the_copy_is_corrected_and_comes_back():
    fp = SmallNet().eval()
    quant_model = quantized(copy.deepcopy(fp))
    fresh = images(300, seed=1)
    with torch.no_grad():
        target, before = fp(fresh).argmax(1), quant_model(fresh)
    state = state_of(quant_model, fp)

    cat_model = apply_cat(quant_model, fp, INPUTS)
    with torch.no_grad():
        corrected = quant_model(fresh)
        assert (corrected.argmax(1) == target).sum() > (before.argmax(1) == target).sum()
        quant_model.set_quant_state(False, False)
        assert not torch.equal(quant_model(fresh), corrected)
        quant_model.set_quant_state(True, True)
        assert torch.equal(quant_model(fresh), corrected)
    cat_model.remove()
    with torch.no_grad():
        assert torch.equal(quant_model(fresh), before)
    assert state_of(quant_model, fp) == state
