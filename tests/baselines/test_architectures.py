"""Kinds of networks, small ones in the ordinary suite and those of torchvision and timm behind the marker ``slow``."""

import pytest
import torch
import torchvision.models as models
from torch import nn
from torchvision.models.mobilenetv2 import InvertedResidual
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from baselines import quantize, summarize
from baselines.network.batch_norm_folding import folded_copy
from baselines.network.blocks import find_blocks
from baselines.network.trace import trace
from baselines.network.units import find_units

from .networks import SmallResNet, images, randomized


def vit() -> nn.Module:
    return VisionTransformer(16, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5)


def swin() -> nn.Module:
    sizes = {"depths": [2, 2], "num_heads": [2, 4], "window_size": [4, 4]}
    return SwinTransformer([2, 2], embed_dim=8, num_classes=5, stochastic_depth_prob=0.0, **sizes)


def deit() -> nn.Module:
    timm = pytest.importorskip("timm")
    options = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.models.vision_transformer.VisionTransformer(**options)


def mobilenet() -> nn.Module:
    """Inverted residuals without, with and again without a shortcut."""
    blocks = [InvertedResidual(3, 8, 2, 2), InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 2)]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 5))


def regnet() -> nn.Module:
    """Bottlenecks of grouped convolutions with squeeze-and-excitation."""
    widths = models.regnet.BlockParams([2, 1], [8, 16], [4, 8], [1.0, 1.0], [2, 2], 0.25)
    return models.regnet.RegNet(widths, num_classes=5, stem_width=8)


def encoder() -> nn.Module:
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.stem, self.encoder, self.head = nn.Conv2d(3, 8, 8, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 5)

        def forward(self, x):
            return self.head(self.encoder(self.stem(x).flatten(2).mT).mean(1))

    return Encoder()


SMALL = {
    "resnet": (SmallResNet, 8, 7, 0, ["conv1", "layer1.0", "layer1.1", "fc"]),
    "mobilenet": (mobilenet, 16, 10, 0, ["0", "1", "2", "5"]),
    "regnet": (
        *(regnet, 16, 19, 0),
        ["stem.0", *(f"trunk_output.{b}" for b in ("block1.block1-0", "block1.block1-1", "block2.block2-0")), "fc"],
    ),
    "vit": (vit, 16, 10, 4, ["conv_proj", *(f"encoder.layers.encoder_layer_{i}" for i in (0, 1)), "heads.head"]),
    "swin": (
        *(swin, 24, 19, 8),
        [*(f"features.{part}" for part in ("0.0", "1.0", "1.1", "2.reduction", "3.0", "3.1")), "head"],
    ),
    "deit": (deit, 16, 10, 4, ["patch_embed.proj", "blocks.0", "blocks.1", "head"]),
    "encoder": (encoder, 16, 10, 4, ["stem", "encoder.layers.0", "encoder.layers.1", "head"]),
}
LARGE = {
    "resnet18": (models.resnet18, 32, 21, 0),
    "resnet50": (models.resnet50, 32, 54, 0),
    "mobilenet_v2": (models.mobilenet_v2, 32, 53, 0),
    "mnasnet0_5": (models.mnasnet0_5, 32, 53, 0),
    "mnasnet1_0": (models.mnasnet1_0, 32, 53, 0),
    "regnet_x_400mf": (models.regnet_x_400mf, 32, 72, 0),
    "vit_b_16": (lambda: models.vit_b_16(image_size=32), 32, 50, 24),
    "swin_t": (models.swin_t, 64, 53, 24),
    "deit_tiny": (lambda: pytest.importorskip("timm").create_model("deit_tiny_patch16_224", img_size=32), 32, 50, 24),
}


def built(build) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return randomized(build())


def check(build, size, layers, products, range_method="mse"):
    """Quantizes, runs, round-trips, and leaves nothing out."""
    model, inputs = built(build), images(16, size=size)
    options = {"batch_size": 8, "range_method": range_method}
    close = quantize(model, inputs, method="rtn", w_bits=8, a_bits=8, **options)
    learned = quantize(model, inputs, method="qdrop", w_bits=4, a_bits=4, iters=2, **options)
    other = quantize(model, inputs[:8], method="rtn", w_bits=4, a_bits=4, **options)
    with torch.no_grad():
        expected = model(inputs)
        assert (close(inputs) - expected).norm() < 0.15 * expected.norm()
        assert not torch.equal(other(inputs), learned(inputs))
        other.load_state_dict(learned.state_dict())
        assert torch.equal(other(inputs), learned(inputs))
    summary = summarize(learned)
    assert (len(summary.layers), len(summary.products)) == (layers, products)
    assert summary.floating_point.unquantized == ()
    first, *inner, last = summary.layers
    assert (first.weight_bits, first.input_bits, last.weight_bits, last.input_bits) == (8, 32, 8, 8)
    assert {(layer.weight_bits, layer.input_bits) for layer in inner} == {(4, 4)}
    assert all((product.left_bits, product.right_bits) == (4, 4) for product in summary.products)
    assert ("softmax" in summary.floating_point.operations) == (products > 0)


@pytest.mark.parametrize(("build", "size", "layers", "products", "units"), SMALL.values(), ids=SMALL)
def test_small_networks_of_each_kind(build, size, layers, products, units):
    folded = folded_copy(built(build), images(2, size=size))
    record = trace(folded, images(2, size=size))
    assert [unit.name for unit in find_units(folded, record, find_blocks(folded, record), "block")] == units
    check(build, size, layers, products)


@pytest.mark.parametrize("build", [vit, swin, deit, encoder])
@pytest.mark.parametrize("method", ["adaround", "brecq", "pd_quant"])
def test_transformers_with_the_other_recipes(build, method):
    size = 24 if build is swin else 16
    model = built(build)
    network = quantize(model, images(16, size=size), method=method, w_bits=8, a_bits=8, iters=2, batch_size=8)
    expected = model(images(4, size=size))
    assert (network(images(4, size=size)) - expected).norm() < 0.15 * expected.norm()


@pytest.mark.slow
@pytest.mark.parametrize(("build", "size", "layers", "products"), LARGE.values(), ids=LARGE)
def test_networks_of_torchvision_and_timm(build, size, layers, products):
    check(build, size, layers, products, range_method="minmax")  # the search takes minutes for 86 million weights
