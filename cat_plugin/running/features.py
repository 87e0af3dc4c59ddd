"""Features of an intermediate layer that may feed the correction beside the logits."""

import threading
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cat_plugin.errors import CATError


class FeatureTap:
    """Forward hook that keeps the last output of the layer `name`, averaged over positions.

    Kept of an output (N, D) is the output itself, of (N, T, D), a sequence, the mean over T, and of (N, D, ...) that
    over all further dimensions; of layers that give channels last, name one behind the pooling.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._handle: RemovableHandle | None = None
        self._kept = threading.local()  # a model may run in several threads

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if not isinstance(output, Tensor) or output.ndim < 2 or not output.is_floating_point():
            found = f"a tensor of shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise CATError(f"layer {self.name!r} gave {found}; features take a floating-point tensor (images, ...)")
        wide = output.detach().to(torch.float64 if output.dtype == torch.float64 else torch.float32)
        if wide.ndim == 3:
            wide = wide.mean(dim=1)
        self._kept.features = wide.flatten(2).mean(dim=2) if wide.ndim > 2 else wide.clone()

    def attach(self, model: nn.Module) -> "FeatureTap":
        """Registers the hook on the layer of `model`.

        Raises:
            CATError: `model` has no layer of this name.
        """
        self._handle = find_layer(model, self.name).register_forward_hook(self)
        return self

    def remove(self) -> None:
        """Takes the hook off; nothing happens the second time."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def take(self) -> Tensor:
        """The features (N, D) of the last forward pass, float32 or float64.

        Raises:
            CATError: the layer has not run since they were last taken.
        """
        kept = getattr(self._kept, "features", None)
        if kept is None:
            raise CATError(f"layer {self.name!r} did not run in this forward pass, so it cannot give features")
        self._kept.features = None
        return kept

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_kept"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _kept=threading.local())


def find_layer(model: nn.Module, name: str, argument: str = "features") -> nn.Module:
    """The layer `name` of `model`, as it was given for `argument`.

    Raises:
        CATError: there is none.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(name, str) or not name or name not in modules:
        known = ", ".join(child for child, _ in model.named_children())
        raise CATError(f"{argument}={name!r} is no layer of {type(model).__name__}; its children are {known}")
    return modules[name]
