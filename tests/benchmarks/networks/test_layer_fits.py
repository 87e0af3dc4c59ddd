"""Corrections of layers that are not the default's."""

import numpy as np
import pytest
import torch
from torch import nn

from baselines import quantize
from benchmarks import BenchmarkError
from benchmarks.measure.draws import Cell, measure
from benchmarks.measure.network_logits import network_sources
from benchmarks.measure.protocol import Protocol, Setting
from benchmarks.networks.layer_fits import VIEWS, Variation, layer_by_layer, layers_of, shifted
from benchmarks.networks.weights_and_transforms import untrained
from cat_plugin import CATConfig
from cat_plugin.layers.fit import Recipe


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 5)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).relu().mean(dim=(2, 3)))


@pytest.fixture
def networks():
    torch.manual_seed(0)
    fp, images = Small().eval(), torch.randn(150, 3, 8, 8)
    return quantize(fp, images[:20], method="rtn", w_bits=2, a_bits=4), fp, images


def test_layer_after_layer_is_least_squares_of_what_the_layers_give(networks):
    """By numpy's fit of a line to every channel, the second layer's on what the corrected first one leads to."""
    quantized, fp, images = networks
    with torch.no_grad():
        plain = quantized(images)
        with layer_by_layer(quantized, fp, images) as corrections:
            changed = quantized(images)
        assert torch.equal(quantized(images), plain) and not torch.equal(changed, plain)
        assert list(corrections) == ["first", "last"]

        def lines(found, wanted):
            pairs = zip(found.movedim(1, 0).flatten(1), wanted.movedim(1, 0).flatten(1), strict=True)
            return np.array([np.polyfit(x.double().numpy(), y.double().numpy(), 1) for x, y in pairs]).T

        scale, shift = lines(quantized.first(images), fp.norm(fp.first(images)))
        np.testing.assert_allclose(corrections["first"].scale, scale, rtol=1e-4)
        np.testing.assert_allclose(corrections["first"].shift, shift, rtol=1e-4, atol=1e-5)
        handle = quantized.first.register_forward_hook(lambda module, args, out: corrections["first"](out))
        scale, shift = lines(quantized(images), fp(images))
        handle.remove()
        np.testing.assert_allclose(corrections["last"].scale, scale, rtol=1e-3)
        np.testing.assert_allclose(corrections["last"].shift, shift, rtol=1e-3, atol=1e-5)


def test_which_layers():
    network, images = untrained("resnet8", 10), torch.randn(2, 1, 8, 8)
    network.unused = nn.Conv2d(3, 3, 1)
    assert layers_of(network, "all", images) == "auto"
    convolutions = layers_of(network, "convolutions", images)
    assert all(isinstance(network.get_submodule(name), nn.Conv2d) for name in convolutions)
    assert "unused" not in convolutions and len(convolutions) > 3
    ends = layers_of(network, "ends of blocks", images)
    assert len(ends) == len({name.rpartition(".")[0] for name in ends}) > 3
    assert set(ends) < {name for name, module in network.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def test_no_such_layers():
    with pytest.raises(BenchmarkError, match="no convolutions"):
        layers_of(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), "convolutions", torch.randn(2, 4))


def test_shifted_images_are_parts_of_the_padded_ones():
    torch.manual_seed(0)
    images = torch.arange(1.0, 1 + 40 * 64).view(40, 1, 8, 8)
    padded = nn.functional.pad(images, (1, 1, 1, 1))
    either = torch.stack([padded, padded.flip(-1)])
    places = set()
    for number, view in enumerate(shifted(images)):
        places |= {
            (side, row, column)
            for side in range(2)
            for row in range(3)
            for column in range(3)
            if torch.equal(view, either[side, number, :, row : row + 8, column : column + 8])
        }
    assert len(places) > 10  # of the 18 there are
    assert VIEWS["shifted"] is shifted


def test_cell_of_layers_is_fitted_on_its_images_through_the_network(dataset, tmp_path, monkeypatch):
    grid = [Setting("rtn", 2, 4, 1)]
    protocol = Protocol(iters=2, n_calib=16, n_cat=24, batch_size=8)
    (source,) = network_sources(grid, protocol, dataset, "resnet8", untrained("resnet8", 10, seed=1), tmp_path)
    cell = Cell(source, 12, 1, "layers", CATConfig(), variation=Variation(recipe=Recipe(steps=0.1), closed_form=True))
    asked = []
    networks = source.networks()
    real = type(networks).corrected
    monkeypatch.setattr(type(networks), "corrected", lambda self, *args: asked.append(args) or real(self, *args))
    found = measure(cell, source.load())
    assert asked == [(cell.config, slice(12, 24), cell.variation)]
    assert found.row.mode == "layers" and found.row.n_eval == len(dataset.test_labels)
