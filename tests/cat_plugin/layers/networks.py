"""A small network, and the same with an error planted in every channel of every layer."""

import torch
from torch import nn

from cat_plugin.layers.images import KeptImages
from cat_plugin.running.collect import Inputs
from cat_plugin.running.positions import Drawn


class Rounded(nn.Module):
    """A plain fake-quantizer of activations, written as most toolkits do."""

    def __init__(self, scale=0.05, levels=255):
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))
        self.levels = levels

    def forward(self, x):
        return (x / self.scale).round().clamp(0, self.levels) * self.scale


class Net(nn.Module):
    """Images (N, 3, 8, 8) to logits (N, 5) through three layers, with a quantizer before each but the first."""

    def __init__(self, seed=0, rounding=Rounded):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first = nn.Conv2d(3, 6, 3)
            self.second = nn.Conv2d(6, 24, 3)
            self.last = nn.Linear(24, 5)
            self.last.weight.data *= 10
        self.rounded, self.rounded_again = rounding(), rounding()

    def forward(self, x):
        x = self.rounded(torch.relu(self.first(x)))
        x = self.rounded_again(torch.relu(self.second(x)))
        return self.last(x.amax(dim=(2, 3)))


def planted(seed=0, size=0.6, rounding=Rounded):
    """`(quantized, fp)`: the first has another scale and offset in every channel of every layer."""
    fp = Net(seed, nn.Identity).eval()
    with torch.no_grad():
        fp.last.bias -= fp(pictures(200, seed=5)).mean(dim=0)  # so that all classes are predicted
    quantized = Net(seed, rounding).eval()
    quantized.load_state_dict(fp.state_dict(), strict=False)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for layer in (quantized.first, quantized.second, quantized.last):
            scale = 1 + size * (torch.rand(len(layer.bias), generator=generator) - 0.5)
            layer.weight.mul_(scale.view(-1, *[1] * (layer.weight.ndim - 1)))
            layer.bias.mul_(scale).add_(0.2 * size * torch.randn(len(scale), generator=generator))
    return quantized, fp


def pictures(n_images, seed=0):
    """Images (N, 3, 8, 8)."""
    return torch.randn(n_images, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def kept_images(batches, shape=(5,), index=None, most_bytes=2**32):
    """`KeptImages` of batches of tensors, with outputs of the given shape for an image."""
    kept = KeptImages(most_bytes)
    for batch in batches:
        kept.append(Inputs(batch, Drawn(torch.Size([len(batch), *shape]), 1, index)))
    return kept


def distance(first, second):
    """Root mean square of the difference, as a share of that of the second."""
    return ((first - second).square().mean() / second.square().mean()).sqrt().item()
