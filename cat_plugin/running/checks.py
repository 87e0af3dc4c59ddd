"""What outputs have to be: of one shape, and finite."""

from collections.abc import Mapping

import torch
from torch import Tensor

from cat_plugin.errors import CATError


def check_same_shape(shapes: Mapping[str, torch.Size]) -> None:
    """Raises a `CATError` unless the outputs of all models (name -> shape) have the same shape."""
    if len(set(shapes.values())) > 1:
        found = ", ".join(f"{name} {tuple(shape)}" for name, shape in shapes.items())
        raise CATError(f"outputs differ in shape for the same batch: {found}; expected the same classes")


def check_finite(logits: Tensor, name: str) -> None:
    """Raises a `CATError` if `logits` (N, C) of the model `name` hold NaN or infinite values."""
    faults = Faults(name)
    faults.look(logits)
    faults.tell()


class Faults:
    """Counts NaN and infinite values of the model `name`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._values = self._images = self._total = 0

    def look(self, logits: Tensor) -> None:
        """Counts those in `logits` (n, C)."""
        bad = ~torch.isfinite(logits)
        self._values += int(bad.sum())
        self._images += int(bad.any(dim=1).sum())
        self._total += len(logits)

    def tell(self) -> None:
        """Raises a `CATError` if there were any."""
        if self._values:
            raise CATError(
                f"{self._name} gave {self._values} NaN or infinite logits, in {self._images} of {self._total} images; "
                "check its scales, and its inputs for values out of range"
            )
