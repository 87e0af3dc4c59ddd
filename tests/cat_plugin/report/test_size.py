import math

import pytest
import torch
from torch import nn

from cat_plugin import apply_cat
from cat_plugin.report.size import model_bytes
from tests.cat_plugin.helpers import Wrapped, images, model_pair


def rounded(bits, *shape):
    """A layer whose weights have up to 2^bits values in each channel, on a grid of its own."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(shape[1], shape[0], bias=False) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2])
    layer.register_parameter("bias", None)
    scale = 0.1 + torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator)
    layer.weight.data = torch.randint(2**bits, shape, generator=generator) * scale
    return layer


@pytest.mark.parametrize("shape", [(20, 1024), (24, 120, 3, 3)], ids=str)
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_simulated_quantization_counts_at_its_bits(bits, shape, dtype):
    assert model_bytes(rounded(bits, *shape).to(dtype)) == math.prod(shape) * bits / 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_floating_point_counts_as_stored(dtype):
    model = nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64), nn.Linear(9000, 10)).to(dtype)
    tensors = [*model.parameters(), *model.buffers()]
    assert model_bytes(model) == sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def test_pruned_weights_count_as_stored_unless_they_are_rounded():
    keep = torch.rand(20, 1024, generator=torch.Generator().manual_seed(0)) < 0.2
    model = nn.Linear(1024, 20, bias=False)
    model.weight.data *= keep
    assert model_bytes(model) == 20 * 1024 * 4
    model = rounded(3, 20, 1024)
    model.weight.data *= keep
    assert model_bytes(model) == 20 * 1024 * 3 / 8


def test_channels_too_short_to_tell_count_as_stored():
    assert model_bytes(rounded(4, 8, 1, 3, 3)) == 8 * 9 * 4
    assert model_bytes(rounded(2, 8, 1, 3, 3)) == 8 * 9 * 2 / 8


def test_integers_and_tied_weights():
    model = nn.ModuleDict({"one": nn.Linear(10, 10), "two": nn.Linear(10, 10, bias=False)})
    model["two"].weight = model["one"].weight
    model.register_buffer("codes", torch.zeros(7, 5, dtype=torch.int8))
    assert model_bytes(model) == 4 * (100 + 10) + 35
    assert model_bytes(nn.ReLU()) == 0


def test_packed_subclass_counts_what_it_stores():
    model = nn.Module()
    model.weight = nn.Parameter(Wrapped(torch.zeros(6, 4, dtype=torch.uint8), torch.ones(6)), requires_grad=False)
    assert model_bytes(model) == 24 + 4 * 6


def test_report_puts_it_beside_what_is_added():
    quantized, fp = (model.eval() for model in model_pair())
    report = apply_cat(quantized, fp, images(200)).report
    assert report.model_bytes == model_bytes(quantized)
    share = report.added_bytes / report.model_bytes
    assert f"bytes on top of the {report.model_bytes:,} bytes of the model at its bit widths ({share:.2%})" in str(
        report
    )
