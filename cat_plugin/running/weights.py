"""Which modules have weights: convolutions and linear layers of any kind and toolkit."""

import re

from torch import Tensor, nn
from torch.nn.utils import parametrize

_NO_WEIGHTS = re.compile(r"mask|(^|_)(scales?|zeros?|zero_points?|offsets?)(_|$)")
"""In names of tensors that belong to weights: of groups, they have an axis more than these."""


def weights_of(module: nn.Module) -> list[Tensor]:
    """What of the module's own tensors, and of those that a parametrization keeps for it, is a matrix or a filter."""
    own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    for name, kept in parametrizations(module).items():
        own += [(f"{name}.{key}", tensor) for key, tensor in kept.named_parameters(recurse=False)]
        own += [(f"{name}.{key}", tensor) for key, tensor in kept.named_buffers(recurse=False)]
    return [tensor for name, tensor in own if tensor.ndim >= 2 and "weight" in name and not _NO_WEIGHTS.search(name)]


def is_packed(module: nn.Module) -> bool:
    """Whether the weights come out of a method, as in `torch.ao.nn.quantized`, not out of a child of that name."""
    weight = getattr(module, "weight", None) if "weight" not in module._modules else None
    return callable(weight)


def is_layer(module: nn.Module) -> bool:
    """Whether the module has a weight of two axes or more of its own, or packed weights."""
    return bool(weights_of(module)) or is_packed(module)


def parametrizations(module: nn.Module) -> dict[str, nn.Module]:
    """Those of torch (`torch.nn.utils.parametrize`), by the name of the tensor that they compute."""
    return dict(module.parametrizations.items()) if parametrize.is_parametrized(module) else {}
