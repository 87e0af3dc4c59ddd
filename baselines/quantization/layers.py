"""Quantized twins of torch's layers: same attributes, plus a quantizer for the weight and one for the input."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from baselines.network.trace import at_place, by_signature, with_first_tensor
from baselines.quantization.quantizers import ActivationQuantizer, WeightQuantizer


class QuantLayer(nn.Module):
    """What the quantized layers share. `weight` holds values on the grid once `harden` was called.

    Attributes:
        weight_quantizer: the grid of the weights, or `None` where they stay in floating point.
        input_quantizer: quantizes the layer's input, or `None` where the input stays in floating point or was
            quantized on entry to the block. Layers that read the same tensor share one quantizer.
        entry_quantizer: the quantizer of the block's input, alone in a tuple, since it is the block's and not the
            layer's; or nothing where the input is not quantized there.
        soft_weight: what reconstruction puts in the place of `weight` for one pass.
    """

    weight_quantizer: WeightQuantizer | None
    input_quantizer: ActivationQuantizer | None
    entry_quantizer: tuple[ActivationQuantizer, ...]
    soft_weight: Tensor | None

    @classmethod
    def of(cls, layer: nn.Module) -> "QuantLayer":
        """Turn `layer` (not kept) into its quantized twin, which takes over its parameters, hooks and flags."""
        twin = cls.__new__(cls)
        twin.__dict__.update(layer.__dict__)
        twin.weight_quantizer = twin.input_quantizer = twin.soft_weight = None
        twin.entry_quantizer = ()
        return twin

    def body(self, x: Tensor) -> Tensor:
        """The layer without the quantization of its input."""
        raise NotImplementedError

    def forward(self, input: Tensor) -> Tensor:  # named as in torch, for those who call layer(input=x)
        return self.body(input if self.input_quantizer is None else self.input_quantizer(input))

    @property
    def input_bits(self) -> int | None:
        """Bits of the input wherever it is quantized, or `None` where it stays in floating point."""
        own = () if self.input_quantizer is None else (self.input_quantizer,)
        return min((quantizer.bits for quantizer in (*own, *self.entry_quantizer)), default=None)

    @property
    def current_weight(self) -> Tensor:
        """The weight of the next pass."""
        return self.weight if self.soft_weight is None else self.soft_weight

    @torch.no_grad()
    def harden(self, weight: Tensor | None = None) -> None:
        """Replace the weight by `weight`, already on the grid; by default by rounding to nearest."""
        self.soft_weight = None
        if self.weight_quantizer is not None:
            self.weight.copy_(self.weight_quantizer(self.weight) if weight is None else weight)

    def extra_repr(self) -> str:
        bits = "FP" if self.weight_quantizer is None else f"{self.weight_quantizer.bits}-bit"
        return f"{super().extra_repr()}, weight={bits}"


class QuantConv1d(QuantLayer, nn.Conv1d):
    def body(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.current_weight, self.bias)


class QuantConv2d(QuantLayer, nn.Conv2d):
    def body(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.current_weight, self.bias)


class QuantConv3d(QuantLayer, nn.Conv3d):
    def body(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.current_weight, self.bias)


class QuantLinear(QuantLayer, nn.Linear):
    def body(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.current_weight, self.bias)


TWINS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.Linear: QuantLinear,
}
"""What takes the place of each quantizable layer."""


class QuantSubclass(QuantLayer):
    """Mixed in before the class of a layer that computes otherwise than torch's: its own forward pass runs as it is
    written, on the quantized input and with the quantized weight."""

    kind: type[nn.Module]

    def forward(self, *args: object, **kwargs: object) -> object:
        if self.input_quantizer is not None:
            kwargs = by_signature(self.kind.forward, kwargs)
            args, kwargs = with_first_tensor(self.input_quantizer, args, kwargs)
        with self._weight_replaced():
            return self.kind.forward(self, *args, **kwargs)

    @contextlib.contextmanager
    def _weight_replaced(self) -> Iterator[None]:
        own = self._parameters["weight"]
        if self.soft_weight is not None:
            self._parameters["weight"] = self.soft_weight
        try:
            yield
        finally:
            self._parameters["weight"] = own

    def __reduce__(self) -> tuple:
        return _blank, (self.kind,), self.__dict__


@functools.cache
def _subclass_twin(kind: type[nn.Module]) -> type[QuantSubclass]:
    return type(f"Quant{kind.__name__}", (QuantSubclass, kind), {"kind": kind, "__module__": kind.__module__})


def _blank(kind: type[nn.Module]) -> QuantSubclass:
    twin = _subclass_twin(kind)
    return twin.__new__(twin)


def quantized_twin(layer: nn.Module) -> QuantLayer:
    """The quantized twin of `layer`, which is not kept."""
    kind = TWINS.get(type(layer)) or _subclass_twin(type(layer))
    return kind.of(layer)


def quantized_layers(model: nn.Module) -> dict[str, QuantLayer]:
    """All quantized layers of `model` by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}


def quantize_on_entry(
    place: int | str, block: nn.Module, args: tuple, kwargs: dict[str, object]
) -> tuple[tuple, dict[str, object]]:
    """Forward pre-hook, once `place` is bound, of a block with an `input_quantizer`: all readers of its input, which is
    the argument at this place, see the quantized tensor."""
    return at_place(place, block.input_quantizer, args, kwargs)
