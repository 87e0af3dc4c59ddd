"""By what a quantized model is known again."""

import dataclasses
import hashlib
import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from cat_plugin.running.inference import named_tensors, storage_leaves, tensor_digest

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """Names, shapes and types of a model's tensors, and their values; the same on every device.

    tensors: how many there are, and numbers: how many numbers they hold. layout, values: SHA-256.
    """

    tensors: int
    numbers: int
    layout: str
    values: str

    @classmethod
    def of(cls, model: nn.Module) -> "Fingerprint":
        """Reads all parameters, buffers, and whatever else the `state_dict` holds, such as packed int8 weights.

        Of tensor subclasses the plain tensors inside count, and of tensors that cannot be read, shape and type.
        """
        layout, values = hashlib.sha256(), hashlib.sha256()
        tensors = numbers = 0
        for name, tensor in sorted(state_tensors(model), key=lambda entry: entry[0]):
            leaves = list(storage_leaves(tensor))
            shapes = [f"{leaf.dtype} {tuple(leaf.shape)}" for leaf in leaves]
            layout.update(f"{name}: {', '.join(shapes)}\n".encode())
            values.update(f"{name}: {_digest(tensor)}\n".encode())
            tensors += 1
            numbers += sum(leaf.numel() for leaf in leaves)
        return cls(tensors, numbers, layout.hexdigest(), values.hexdigest())

    def difference(self, other: "Fingerprint") -> str | None:
        """What tells the model of `self`, then, from that of `other`, now; None for the same."""
        if self.layout != other.layout:
            return (
                f"it had {self.tensors:,} tensors of {self.numbers:,} numbers and now has {other.tensors:,} of "
                f"{other.numbers:,}, or they have other names, shapes or types"
            )
        return "its weights or buffers have other values" if self.values != other.values else None


def state_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of all parameters, buffers, and what else the `state_dict` holds."""
    named = dict(named_tensors(model))
    yield from named.items()
    try:
        state = model.state_dict()
    except Exception:  # of other people's hooks
        logger.debug("no state_dict of %s", type(model).__name__, exc_info=True)
        return
    for name, value in state.items():
        if name not in named:
            yield from _tensors(name, value)


def _tensors(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _tensors(f"{name}.{index}", part)


def _digest(tensor: Tensor) -> str:
    try:
        return tensor_digest(tensor)
    except (RuntimeError, TypeError, NotImplementedError, ValueError):  # no memory of its own, as sparse tensors
        return "unreadable"
