"""A forward hook that keeps what a model gives for a batch, and where hooks on its layers would act."""

import difflib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

from cat_plugin.errors import CATError
from cat_plugin.running.models import is_compiled
from cat_plugin.running.outputs import Output, extract

NAME = "quantized_model"


class Capture:
    """Forward hook that keeps the logits of the quantized model, which `output` says where to find."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._kept: ContextVar[list[Tensor] | None] = ContextVar("outputs of this thread", default=None)
        self._kept.set([])

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        kept = self._kept.get()
        if kept is not None:  # else another thread runs the model meanwhile
            kept.append(extract(output, NAME, self._output))

    def take(self) -> Tensor:
        """What was kept of the forward passes that this thread (or task) has run since it was last taken.

        Raises:
            CATError: there was none.
        """
        kept = self._kept.get() or []
        self._kept.set([])
        if not kept:
            raise CATError(
                f"the forward hook on {NAME} never fired for a batch, so CAT could not act on it: its __call__ "
                "bypasses torch.nn.Module.__call__ (for instance by calling forward directly), or forward_fn does not "
                "call the model it is given; override forward instead, or give the module that is really called"
            )
        return kept[-1]


@contextmanager
def captured(model: nn.Module, output: Output) -> Iterator[Capture]:
    """A `Capture` on the quantized `model` inside the block."""
    capture = Capture(output)
    handle = model.register_forward_hook(capture)
    try:
        yield capture
    finally:
        handle.remove()


def find_layers(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Module]:
    """The layers of `model` with the given names.

    Raises:
        CATError: as `find_layer`; or two of the names are of one layer.
    """
    found = {name: find_layer(model, name) for name in names}
    if len({id(layer) for layer in found.values()}) < len(found):
        raise CATError(f"two of the layers {', '.join(found)} are one and the same; name it once")
    return found


def find_layer(model: nn.Module, name: str) -> nn.Module:
    """The layer `name` of `model`.

    Raises:
        CATError: there is none, or it is inside of what `torch.compile` made, where hooks need not run.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if not isinstance(name, str) or not name or name not in modules:
        like = difflib.get_close_matches(str(name), filter(None, modules))
        known = ", ".join(like or (child for child, _ in model.named_children()))
        what = "names like it are" if like else "its children are"
        raise CATError(f"{name!r} is no layer of {type(model).__name__}; {what} {known}")
    if is_in_compiled(modules, name):
        raise CATError(
            f"{name!r} is inside of a compiled {type(model).__name__}, where hooks need not run; give the model that "
            "was compiled, and compile what bake() gives"
        )
    return modules[name]


def is_in_compiled(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Whether `torch.compile` made the model, or a module of it that the layer `name` is in.

    modules: all of the model, by name.
    """
    parts = name.split(".")
    return any(is_compiled(modules[".".join(parts[:end])]) for end in range(len(parts)))
