"""A layer and its correction as one module, without a hook."""

import functools
from collections.abc import Callable
from typing import Any

from torch import nn

from cat_plugin.correction.channel_affine import ChannelAffine
from cat_plugin.correction.hook import LayerHook, Switch
from cat_plugin.running.outputs import with_first_changed

NAME = "cat_correction"


class CorrectedLayer(nn.Module):
    """Mixed in before the class of a layer, whose output is corrected by its child `cat_correction`."""

    _cat_class: type[nn.Module]
    cat_correction: ChannelAffine

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return with_first_changed(self._cat_class.forward(self, *args, **kwargs), self.cat_correction)

    def __reduce__(self) -> tuple:
        plain = object.__new__(self._cat_class)
        plain.__dict__.update(self.__dict__)
        make, arguments, *state = plain.__reduce_ex__(2)  # the state comes second: a layer may hold itself
        return _remade, (make, arguments), *state


def corrected_layer(layer: nn.Module, correction: ChannelAffine) -> nn.Module:
    """`layer`, an object of nobody else, with its output corrected from now on."""
    if layer._forward_hooks or "forward" in vars(layer):
        LayerHook(correction, Switch()).attach(layer)
        return layer
    layer.__dict__["_modules"] = {**layer._modules, NAME: correction}
    return _of(layer)


def _of(layer: nn.Module) -> CorrectedLayer:
    made = object.__new__(_class_of(type(layer)))  # not every class can be given to an object that is there
    made.__dict__.update(layer.__dict__)
    return made


def _remade(make: Callable[..., nn.Module], arguments: tuple) -> CorrectedLayer:
    return _of(make(*arguments))


@functools.cache
def _class_of(kind: type[nn.Module]) -> type[CorrectedLayer]:
    members = {"_cat_class": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind.__name__, (CorrectedLayer, kind), members)
