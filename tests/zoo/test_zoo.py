"""Ten families in the ordinary suite; all of them behind the marker ``zoo``, with a table by ``make zoo``."""

import math

import pytest
import torch
from torch import nn

from baselines import quantize

from .examine import OPTIONS, examine, plain_quantized, quantized_share, table
from .families import FAMILIES, LEFT, ORDINARY


def check(family):
    one = FAMILIES[family]
    row = examine(family, one.name, one.size, one.build)
    assert not row.failure
    assert row.layers > 2 and bool(row.left) == (family in LEFT)
    assert row.share > 0.99 or family in LEFT
    assert math.isfinite(row.error) and row.error <= 2 * row.plain_error + 0.02
    assert (row.state, row.files, row.export) == ("yes", "yes", "yes")


@pytest.mark.parametrize("family", ORDINARY)
def test_families_of_the_ordinary_suite(family):
    check(family)


@pytest.mark.zoo
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in ORDINARY])
def test_all_other_families(family):
    check(family)


class HalfLeft(nn.Module):
    """Two layers of as many multiplications, of which the second is transposed, so that it is not quantized."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.head = nn.Conv2d(3, 3, 1), nn.ConvTranspose2d(3, 3, 1), nn.Linear(3, 10)

    def forward(self, x):
        return self.head(self.two(self.one(x).relu()).mean((2, 3)))


@pytest.mark.filterwarnings("ignore")
def test_what_is_left_is_in_the_table():
    row = examine("half", "HalfLeft", 16, HalfLeft)
    assert not row.failure and row.left == ("two",) and not row.whole
    network = quantize(HalfLeft().eval(), torch.randn(8, 3, 16, 16), method="rtn", **OPTIONS)
    assert (
        row.share == quantized_share(network, torch.randn(1, 3, 16, 16)) == (16 * 16 * 9 + 30) / (2 * 16 * 16 * 9 + 30)
    )
    lines = list(table([row, examine("none", "nn.Identity", 16, nn.Identity)]))
    assert lines[2].startswith("| half | HalfLeft | 16 | 2 | 0 | 1 | 50.3 % |")
    assert "0 of 2 families with every layer quantized (0 %)." in lines
    assert lines[-2] == "- half (HalfLeft): left: unknown (two)" and lines[-1].startswith(
        "- none (nn.Identity): ValueError:"
    )


def test_plain_fake_quantizer_puts_weights_and_inputs_on_grids_of_256_values():
    model, images = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()).eval(), torch.randn(8, 3, 16, 16)
    seen = []
    twin = plain_quantized(model, images)
    twin[0].register_forward_hook(lambda layer, args, output: seen.append(args[0]))
    with torch.no_grad():
        error = (twin(images) - model(images)).norm() / model(images).norm()
    assert 0 < error < 0.02
    assert len(seen[0].unique()) <= 256 < len(images.unique())
    assert seen[0].min() == images.min() and (seen[0].max() - images.max()).abs() < 1e-5
