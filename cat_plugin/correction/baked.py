"""The corrected model as a plain module, for what hooks do not reach: compilers, exporters, `state_dict`."""

import copy
import inspect
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn

from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.correction.corrected_layer import corrected_layer
from cat_plugin.correction.folding import fold_into
from cat_plugin.correction.hook import OutputHook
from cat_plugin.correction.twin import shallow_copy, twin_of
from cat_plugin.running.loaders import model_device

EMPTY: Mapping[str, ChannelAffine] = MappingProxyType({})


class BakedCAT(nn.Module):
    """A quantized model and the corrections of its layers and its output, in one.

    Gives what the hooked model gives, to callers, `torch.compile`, `torch.export` and the ONNX exporter alike, and is
    called with the same arguments. It shares the parameters, buffers and layers of the quantized model, which is not
    copied and keeps its hooks: that model stays corrected until `CATWrapper.remove`, this module for good. Moving or
    converting one therefore moves or converts the weights of both, and `train()` of one sets the mode of the layers of
    both; `copy.deepcopy` gives a module of its own, for models that allow it. Corrections are copies. A corrected layer
    is an object of its own, of a subclass of its class, with the same weights; one that has forward hooks of others, or
    a `forward` that is not its class's, keeps its correction as a hook, which comes after those. Other forward hooks of
    the model act here before the correction of its output. Layers are found among children, and in containers, bound
    methods and closures, see `cat_plugin.correction.holders`; objects of other classes that hold one hold the user's.

    Args:
        model: the hooked model.
        hook: that of its output.
        layers: corrections by the names of layers.
        fold: put what can be into the weights and biases of the layers, which are copies then, see
            `cat_plugin.correction.folding`.

    Attributes:
        unfolded: names of the layers whose correction is computed on its own.
    """

    def __init__(
        self, model: nn.Module, hook: OutputHook, layers: Mapping[str, ChannelAffine] = EMPTY, fold: bool = False
    ) -> None:
        super().__init__()
        self.training = model.training
        modules = dict(model.named_modules(remove_duplicate=False))
        unfolded = []

        def correct(name: str) -> nn.Module:
            twin = shallow_copy(modules[name])
            part = copy.deepcopy(layers[name]).to(model_device(twin))
            folded = fold_into(twin, part) if fold else None
            if folded is not None:
                return folded
            unfolded.append(name)
            return corrected_layer(twin, part)

        self.quantized_model = twin_of(model, {id(modules[name]): partial(correct, name) for name in layers})
        self.unfolded = tuple(unfolded)
        self._corrector = hook.unattached()
        self.correction = self._corrector.correction
        self._take_signature()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The corrected output of the quantized model."""
        return self._corrector.correct(self.quantized_model, self.quantized_model(*args, **kwargs))

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
        return _blank, (), self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._take_signature()


def _blank() -> BakedCAT:
    return BakedCAT.__new__(BakedCAT)
