"""By what a quantized model is known again."""

import dataclasses
import hashlib

from torch import Tensor, nn

from cat_plugin.running.digests import tensor_digest
from cat_plugin.running.models import CONTAINERS, inside
from cat_plugin.running.tensors import state_tensors, storage_leaves

_COMPILED = f"{CONTAINERS['OptimizedModule']}."
"""In names below a part that is compiled by itself."""


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

        The same under `nn.DataParallel`, `DistributedDataParallel` and `torch.compile`. Of tensor subclasses the plain
        tensors inside count, and of tensors that cannot be read, shape and type.
        """
        layout, values = hashlib.sha256(), hashlib.sha256()
        tensors = numbers = 0
        named = ((name.replace(_COMPILED, ""), tensor) for name, tensor in state_tensors(inside(model)[0]))
        for name, tensor in sorted(named, key=lambda entry: entry[0]):
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


def _digest(tensor: Tensor) -> str:
    try:
        return tensor_digest(tensor)
    except (RuntimeError, TypeError, NotImplementedError, ValueError):  # no memory of its own, as sparse tensors
        return "unreadable"
