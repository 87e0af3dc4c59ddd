import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from baselines import quantize
from cat_plugin import CATError, apply_cat
from cat_plugin.report.layers import LayerCount, count_layers, inspect_models
from tests.cat_plugin.helpers import model_pair


class FakeQuantLinear(nn.Linear):
    """Rounds as it runs, as many toolkits do, and says so in its name only."""


class Holder(nn.Module):
    """A layer with a quantizer beside its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 40, generator=torch.Generator().manual_seed(0)))
        self.weight_quantizer = nn.Identity()


class Packed(nn.Module):
    """Its weights come out of a method."""

    def weight(self):
        return torch.zeros(2, 2)


def network():
    return nn.Sequential(nn.Conv2d(3, 40, 3), nn.BatchNorm2d(40), nn.ReLU(), nn.Flatten(), nn.Linear(40, 10))


def rounded(model):
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter.abs().max() / 2 or 1
            parameter.copy_((parameter / scale).round() * scale)
    return model


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (network(), LayerCount(0, 2)),
        (rounded(network()), LayerCount(2, 2)),
        (nn.Sequential(FakeQuantLinear(40, 4), nn.Linear(40, 4)), LayerCount(1, 2)),
        (nn.Sequential(Holder(), nn.Linear(40, 4)), LayerCount(1, 2)),
        (nn.Sequential(Packed(), nn.ReLU()), LayerCount(1, 1)),
        (nn.ReLU(), LayerCount(0, 0)),
    ],
    ids=["float", "simulated", "by name", "by quantizer", "packed", "no layer"],
)
def test_layers_that_look_quantized(model, expected):
    assert count_layers(model) == expected


def pruned(model, share):
    for layer in model:
        prune.random_unstructured(layer, "weight", share)
    return model


@pytest.mark.parametrize(
    "model",
    [
        nn.TransformerEncoderLayer(32, 2),  # holds a NonDynamicallyQuantizableLinear
        nn.Sequential(nn.Linear(40, 4), nn.Conv2d(8, 8, 3)).apply(
            lambda module: nn.init.zeros_(module.weight) if hasattr(module, "weight") else None
        ),
        pruned(nn.Sequential(nn.Linear(400, 4), nn.Conv2d(40, 8, 3)), 0.8),  # masks beside the weights
        nn.Sequential(weight_norm(nn.Linear(40, 4)), weight_norm(nn.Conv2d(8, 8, 3))),
        nn.Sequential(spectral_norm(nn.Linear(40, 4)), nn.Conv2d(8, 8, 3)),
        nn.Sequential(*(prune.remove(layer, "weight") for layer in pruned(nn.Sequential(nn.Linear(400, 4)), 0.8))),
    ],
    ids=["attention", "zeros", "masked", "weight-norm", "spectral-norm", "pruned"],
)
def test_full_precision_that_is_easily_mistaken(model):
    assert count_layers(model).quantized == 0


class FakeQuantize(nn.Module):
    def forward(self, weight):
        return (weight * 4).round() / 4


def test_parametrized_layers_count_by_what_computes_their_weight():
    model = nn.Sequential(weight_norm(nn.Linear(40, 4)), nn.Linear(40, 4), nn.Linear(40, 4))
    parametrize.register_parametrization(model[1], "weight", FakeQuantize())
    assert count_layers(model) == LayerCount(1, 3)
    assert count_layers(rounded(model)) == LayerCount(3, 3)


def test_a_graph_counts_by_its_operators():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    for rounds in (True, False):
        if rounds:
            x = graph.call_method(
                "dequantize", (graph.call_function(torch.quantize_per_tensor, (x, 0.1, 0, torch.qint8)),)
            )
        x = graph.call_function(torch.matmul, (x, x))
    graph.output(x)
    assert count_layers(torch.fx.GraphModule(nn.Module(), graph)) == LayerCount(1, 2)


def test_parameters_that_are_still_to_be_made_are_an_error():
    for lazy_first in (True, False):
        models = nn.Linear(6, 4), nn.LazyLinear(4)
        with pytest.raises(CATError, match="its first batch is to make, such as 'weight'; run one"):
            apply_cat(*(reversed(models) if lazy_first else models), torch.randn(64, 6))


def test_networks_of_the_baselines_look_quantized():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    low_bit = quantize(model, torch.randn(8, 3, 8, 8), method="rtn", w_bits=4, a_bits=4)
    assert count_layers(low_bit) == LayerCount(2, 2)
    assert inspect_models(low_bit.eval(), model.eval())[1] == []


def test_training_mode_is_told_and_left():
    quantized, fp = (model.eval() for model in model_pair())
    assert inspect_models(quantized, fp)[1] == []
    quantized.first.train()  # behaves the same
    assert inspect_models(quantized, fp)[1] == []
    fp.train()
    (found,) = inspect_models(quantized, fp)[1]
    assert "2 modules of fp_model" in found and "BatchNorm1d" in found and "eval()" in found
    assert fp.training


def test_exchanged_models_are_told():
    fp = network().eval()
    (found,) = inspect_models(fp, rounded(fp))[1]
    assert "of quantized_model 0 of 2 layers look quantized, of fp_model 2 of 2" in found and "exchanged" in found


def test_a_quantized_fp_model_is_told():
    low_bit = rounded(network()).eval()
    (found,) = inspect_models(low_bit, low_bit)[1]
    assert "of fp_model 2 of 2 layers look quantized: it should be the full-precision model" in found
