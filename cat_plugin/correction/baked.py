"""The corrected model as a plain module, for what hooks do not reach: compilers, exporters, `state_dict`."""

import inspect
from collections import OrderedDict
from typing import Any

from torch import nn

from cat_plugin.correction.hook import CATHook
from cat_plugin.running.taps import find_layer


class BakedCAT(nn.Module):
    """A quantized model and the correction of its output, one after the other.

    Gives what the hooked model gives, to callers, `torch.compile`, `torch.export` and the ONNX exporter alike, and is
    called with the same arguments. It shares the parameters, buffers and layers of the quantized model, which is not
    copied and keeps its hook: that model stays corrected until `CATWrapper.remove`, this module for good. Moving or
    converting one therefore moves or converts the weights of both, and `train()` of one sets the mode of the layers of
    both; `copy.deepcopy` gives a module of its own, for models that allow it. The correction is a copy; that of a layer
    stays a hook, on a layer of this module alone. Other forward hooks of the model act here before the correction.

    Args:
        model: the hooked model.
        hook: its hook.
    """

    def __init__(self, model: nn.Module, hook: CATHook) -> None:
        super().__init__()
        self.training = model.training
        self.quantized_model = _twin(model, None if hook.layer is None else find_layer(model, hook.layer, "layer"))
        self._corrector = hook.unattached()
        self.correction = self._corrector.correction
        if hook.layer is not None:
            self._corrector.attach(self.quantized_model)
        self._take_signature()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The corrected output of the quantized model."""
        output = self.quantized_model(*args, **kwargs)
        return output if self._corrector.layer else self._corrector.correct(self.quantized_model, output)

    def _take_signature(self) -> None:
        """Names the arguments of `forward` as the model does, by which exporters know inputs and their dynamic sizes.

        They ask the class and not the object, so every object gets a class of its own, as in `torch.fx.GraphModule`.
        """
        try:
            signature = inspect.signature(self.quantized_model.forward)
        except (TypeError, ValueError):  # compiled functions need not tell
            return

        def forward(self, *args, **kwargs):
            return BakedCAT.forward(self, *args, **kwargs)

        this = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
        forward.__signature__ = signature.replace(parameters=[this, *signature.parameters.values()])
        members = {"forward": forward, "__doc__": BakedCAT.__doc__, "__module__": BakedCAT.__module__}
        self.__class__ = type(BakedCAT.__name__, (BakedCAT,), members)

    def __reduce__(self) -> tuple:
        return _blank, (), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_signature()


def _blank() -> BakedCAT:
    return BakedCAT.__new__(BakedCAT)


def _twin(model: nn.Module, layer: nn.Module | None) -> nn.Module:
    """A second object for `model`, and for `layer` wherever it is inside, without the hooks of CAT.

    Both hold the same parameters, buffers and layers; hooks that are put on the one do not act on the other.
    """
    twins: dict[int, nn.Module] = {}

    def visit(module: nn.Module) -> nn.Module:
        if id(module) not in twins:
            children = {name: None if c is None else visit(c) for name, c in module._modules.items()}
            has_other_children = any(children[name] is not child for name, child in module._modules.items())
            needed = module is model or module is layer or has_other_children
            twins[id(module)] = _shallow_copy(module, children if has_other_children else None) if needed else module
        return twins[id(module)]

    return visit(model)


def _shallow_copy(module: nn.Module, children: dict[str, nn.Module | None] | None) -> nn.Module:
    """Another object with the contents of `module`, and other `children` where there are any."""
    twin = object.__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__.pop("_compiled_call_impl", None)  # calls the original
    if children is not None:
        twin.__dict__["_modules"] = children
    hooks = ((key, hook) for key, hook in module._forward_hooks.items() if not isinstance(hook, CATHook))
    twin.__dict__["_forward_hooks"] = OrderedDict(hooks)
    return twin
