"""Forward hooks that keep what a model, or a layer of it, gives for a batch."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from cat_plugin.errors import CATError
from cat_plugin.running.models import is_compiled
from cat_plugin.running.outputs import Output, extract


class Capture:
    """Forward hook that keeps the logits of the model `name`, or the output of its layer `layer`.

    Of a layer a copy is kept, since the next one may work in place.
    """

    def __init__(self, name: str, layer: str | None, output: Output) -> None:
        self.name = name if layer is None else f"layer {layer!r} of {name}"
        self._is_layer = layer is not None
        self._extraction = {"where": output, "lenient": name == "fp_model"}
        self._kept: ContextVar[list[Tensor] | None] = ContextVar("outputs of this thread", default=None)
        self._kept.set([])

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        kept = self._kept.get()
        if kept is not None:  # else another thread runs the model meanwhile
            found = extract(output, self.name, **self._extraction)
            kept.append(found.detach().clone() if self._is_layer else found)

    def take(self) -> Tensor:
        """What was kept of the forward passes that this thread (or task) has run since it was last taken.

        Raises:
            CATError: there was none, or it ran the layer several times.
        """
        kept = self._kept.get() or []
        self._kept.set([])
        if not kept and self._is_layer:
            raise CATError(f"{self.name} did not run in a forward pass; name one that does")
        if not kept:
            raise CATError(
                f"the forward hook on {self.name} never fired for a batch, so CAT could not act on it: its __call__ "
                "bypasses torch.nn.Module.__call__ (for instance by calling forward directly), or forward_fn does not "
                "call the model it is given; override forward instead, or give the module that is really called"
            )
        if len(kept) > 1 and self._is_layer:
            raise CATError(f"{self.name} ran {len(kept)} times in a forward pass; name one that runs once")
        return kept[-1]


@contextmanager
def captured(model: nn.Module, name: str, layer: str | None, output: Output) -> Iterator[Capture]:
    """A `Capture` on `model`, which is called `name` in errors, inside the block."""
    capture = Capture(name, layer, output)
    target = model if layer is None else find_layer(model, layer, "layer")
    if isinstance(target, torch.jit.ScriptModule):
        raise CATError(
            f"{capture.name} is TorchScript, which takes no hooks; give the torch.nn.Module that it was made from"
        )
    handle = target.register_forward_hook(capture)
    try:
        yield capture
    finally:
        handle.remove()


def find_layer(model: nn.Module, name: str, argument: str) -> nn.Module:
    """The layer `name` of `model`, as it was given for `argument`.

    Raises:
        CATError: there is none, or it is inside of what `torch.compile` made, where hooks need not run.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(name, str) or not name or name not in modules:
        known = ", ".join(child for child, _ in model.named_children())
        raise CATError(f"{argument}={name!r} is no layer of {type(model).__name__}; its children are {known}")
    parts = name.split(".")
    around = ("", *(".".join(parts[:end]) for end in range(1, len(parts))))
    if any(is_compiled(modules[path]) for path in around):
        raise CATError(
            f"{argument}={name!r} is inside of a compiled {type(model).__name__}, where hooks need not run; give "
            "the model that was compiled, and compile what bake() gives"
        )
    return modules[name]
