"""Which layers quantization replaces."""

from torch import nn

QUANTIZABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that quantization replaces, and so are those that inherit from them."""

_LOOK_QUANTIZABLE = (
    *(nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.Embedding, nn.EmbeddingBag),
    *(nn.MultiheadAttention, nn.RNNBase),
)
_LEFT = "_left_in_floating_point"


def is_quantizable(module: nn.Module) -> bool:
    """Whether `module` is a layer that quantization replaces.

    One that inherits from such a layer, and may compute otherwise, is, too: it keeps its own forward pass. Not so a
    forward pass set on the module itself, a weight that is computed anew for each pass, and what `leave` named.
    """
    return (
        isinstance(module, QUANTIZABLE)
        and "weight" in module._parameters
        and module.weight is not None
        and "forward" not in vars(module)
        and not hasattr(module, _LEFT)
    )


def is_subclass(module: nn.Module) -> bool:
    """Whether `module` is quantizable and of a class of its own, which may compute otherwise than torch's."""
    return is_quantizable(module) and type(module) not in QUANTIZABLE


def leave(module: nn.Module) -> None:
    """Let quantization not replace `module`."""
    setattr(module, _LEFT, True)


def looks_quantizable(module: nn.Module) -> bool:
    """Whether a user would expect `module` to be quantized, though it may be of a kind that is not replaced."""
    return isinstance(module, _LOOK_QUANTIZABLE)


def quantizable_layers(model: nn.Module) -> list[str]:
    """Names of the layers of a plain network that quantization replaces."""
    return [name for name, module in model.named_modules() if is_quantizable(module)]
