"""From a model's output to its logits and back: the one place that knows what models return."""

from typing import Any

from torch import Tensor

from cat_plugin.errors import CATError


def extract(output: Any, source: str = "the model") -> Tensor:
    """The logits (N, C) inside `output`, what the model named `source` returned.

    Raises:
        CATError: `output` is not a 2-D floating-point tensor.
    """
    if not isinstance(output, Tensor):
        raise CATError(f"{source} returned {_describe(output)}; expected one tensor of logits (images, classes)")
    if output.ndim != 2 or not output.is_floating_point():
        raise CATError(
            f"{source} returned a tensor of shape {tuple(output.shape)} and dtype {output.dtype}; "
            "expected floating-point logits of shape (images, classes)"
        )
    return output


def insert(output: Any, logits: Tensor) -> Tensor:
    """`output` with its logits replaced by `logits` (N, C); the inverse of `extract`."""
    del output  # a tensor is nothing but its logits
    return logits


def _describe(value: Any) -> str:
    name = type(value).__name__
    if isinstance(value, dict):
        return f"a {name} with keys {list(value)}"
    if isinstance(value, list | tuple):
        return f"a {name} of {len(value)}: ({', '.join(type(item).__name__ for item in value)})"
    return f"a {name}"
