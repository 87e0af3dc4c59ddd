"""The forward hooks by which a correction acts on the user's own model."""

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from threading import Lock
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.correction.module import ClusterAffine
from cat_plugin.errors import CATError
from cat_plugin.running.outputs import Output, extract, insert, with_first_changed
from cat_plugin.running.positions import class_axis_of, from_rows, to_rows

_DISABLED: ContextVar[frozenset[int]] = ContextVar("ids of the switches that are off here", default=frozenset())
_COUNTING = Lock()


class _NotScriptable(CATError, AttributeError):
    """What TorchScript asks for and a hook does not have; an `AttributeError` for those who ask whether it is there."""


class Switch:
    """What turns all hooks of a correction off and on again, for one thread (or task) alone."""

    def __init__(self) -> None:
        self._blocks = 0  # of disabled(), in any thread

    @property
    def is_off(self) -> bool:
        """Whether this thread is inside of `disabled()`."""
        # The count is asked first: it is all that compilers have to know.
        return bool(self._blocks) and id(self) in _DISABLED.get()

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model gives its plain output inside the block, to this thread (or task) alone; blocks can be nested."""
        token = _DISABLED.set(_DISABLED.get() | {id(self)})
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)
            _DISABLED.reset(token)

    def _count(self, change: int) -> None:
        with _COUNTING:
            self._blocks += change

    def __getstate__(self) -> dict[str, Any]:
        # A copy made inside disabled() has no block that would ever enable it again.
        return {"_blocks": 0}


class CATHook:
    """Forward hook that replaces what a module returns by the corrected value.

    A class and not a closure, so that the hooked model can be deep-copied and pickled. The hook
    holds its own handle for the same reason: unpickling a handle reserves its number, without
    which the next hook on a model loaded in a new process would overwrite this one.

    Args:
        switch: shared by the hooks of one correction.
    """

    correction: nn.Module

    def __init__(self, switch: Switch) -> None:
        self.switch = switch
        self._handle: RemovableHandle | None = None

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return output if self.switch.is_off else self.correct(module, output)

    def correct(self, module: nn.Module, output: Any) -> Any:
        """What `module` returned, corrected, whether or not the hook is disabled."""
        raise NotImplementedError

    def attach(self, module: nn.Module) -> None:
        """Registers the hook on `module`."""
        self._handle = module.register_forward_hook(self)

    def unattached(self) -> "CATHook":
        """A hook that corrects alike, with a copy of the correction, and is on no model."""
        twin = copy.copy(self)
        twin.correction = copy.deepcopy(self.correction)
        twin.switch = Switch()
        twin._handle = None
        return twin

    def remove(self) -> None:
        """Takes the hook off its module; nothing happens the second time."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def __name__(self) -> str:
        raise _NotScriptable(
            "TorchScript compiles no hooks: torch.jit.trace takes the corrected model as it is, torch.export and ONNX "
            "take CATWrapper.bake(); or call remove() and script the model without its correction"
        )


class OutputHook(CATHook):
    """Corrects the logits in what a model returns.

    Args:
        output, class_axis: where they are, see `cat_plugin.running.outputs` and `cat_plugin.running.positions`.
    """

    def __init__(
        self, correction: ClusterAffine, switch: Switch, output: Output = None, class_axis: int | None = None
    ) -> None:
        super().__init__(switch)
        self.correction = correction
        self._two_classes = correction.num_classes == 2  # tracers would take the shape of a buffer for data
        self.output = output
        self.class_axis = class_axis

    def correct(self, module: nn.Module, output: Any) -> Any:
        logits = extract(output, type(module).__name__, self.output)
        if self.correction.scale.device != logits.device:
            self.correction.to(logits.device)
        axis = class_axis_of(logits, self.class_axis) if logits.ndim > 2 else 1
        binary = self._two_classes and logits.shape[axis] == 1
        corrected = self.correction(to_rows(logits, axis, binary))
        return insert(output, from_rows(corrected, logits, axis, binary), self.output)


class LayerHook(CATHook):
    """Corrects what a layer returns, channel by channel; of several tensors the first."""

    def __init__(self, correction: ChannelAffine, switch: Switch) -> None:
        super().__init__(switch)
        self.correction = correction

    def correct(self, module: nn.Module, output: Any) -> Any:
        return with_first_changed(output, self._changed)

    def _changed(self, values: Tensor) -> Tensor:
        correction = self.correction
        if correction.scale.device != values.device:  # replicas of nn.DataParallel share the hook: nothing is moved
            moved = (part.to(values.device) for part in (correction.scale, correction.shift))
            correction = ChannelAffine(*moved, correction.axis)
        return correction(values)


def find_hooks(model: nn.Module) -> list[CATHook]:
    """All CAT hooks on `model` and its submodules."""
    return [hook for module in model.modules() for hook in module._forward_hooks.values() if isinstance(hook, CATHook)]


def refuse_attached(model: nn.Module) -> None:
    """Raises a `CATError` if `model` already carries a correction."""
    if find_hooks(model):
        raise CATError(
            f"CAT is already attached to this {type(model).__name__}; "
            "call remove() on the CATWrapper that apply_cat returned before attaching again"
        )


@contextmanager
def uncorrected(model: nn.Module) -> Iterator[None]:
    """Inside the block, `model` gives its plain output whatever corrections it carries."""
    with ExitStack() as stack:
        for hook in find_hooks(model):
            stack.enter_context(hook.switch.disabled())
        yield
