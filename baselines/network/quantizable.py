"""Which layers quantization replaces."""

from torch import nn

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that quantization replaces."""


def is_quantizable(module: nn.Module) -> bool:
    """Whether `module` is a layer that quantization replaces.

    Exact types only, since a subclass may compute otherwise, as may a forward pass set on the module itself, and with a
    weight of its own, not one that is computed anew for each pass (weight normalisation).
    """
    return type(module) in QUANTIZABLE and "weight" in module._parameters and "forward" not in vars(module)


def looks_quantizable(module: nn.Module) -> bool:
    """Whether a user would expect `module` to be quantized, though it may be of a kind that is not replaced."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase))


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a plain network that quantization replaces."""
    return [name for name, module in model.named_modules() if is_quantizable(module)]
