"""The correction of a layer inside the network: a scale and an offset per channel of its output."""

import torch
from torch import Tensor

from cat_plugin.correction.buffers import Buffers, outside_inference_mode
from cat_plugin.errors import CATError


class ChannelAffine(Buffers):
    """Corrects the output of a layer channel by channel: `out = x * scale + shift`.

    ========  =====  ==============================================
    buffer    shape  holds
    ========  =====  ==============================================
    scale     (C,)   factor of every output channel
    shift     (C,)   what is added to it, in units of the output
    ========  =====  ==============================================

    Computes in float32, or float64 for float64 inputs, and returns the input's dtype.

    Args:
        axis: that of the channels, counted from the last one: -1 of (N, T, C), -3 of (N, C, H, W).

    Raises:
        CATError: buffers of other shapes, or an axis that is not negative.

    Example:
        >>> import torch
        >>> from cat_plugin import ChannelAffine
        >>> correction = ChannelAffine(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 5.0]), axis=-1)
        >>> correction(torch.tensor([[1.0, 1.0]]))
        tensor([[2., 6.]])
    """

    scale: Tensor
    shift: Tensor

    @outside_inference_mode
    def __init__(self, scale: Tensor, shift: Tensor, axis: int) -> None:
        super().__init__()
        if scale.ndim != 1 or scale.shape != shift.shape or len(scale) == 0 or not axis < 0:
            raise CATError(
                f"got scale {tuple(scale.shape)}, shift {tuple(shift.shape)} and axis {axis}; expected (C,) twice and "
                "an axis counted from the last one, such as -1"
            )
        self.axis = axis
        self._hold("scale", scale)
        self._hold("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        """Corrected outputs in the shape and dtype of `x`.

        Raises:
            CATError: `x` has other channels.
        """
        if x.is_nested and x.layout == torch.strided:  # of a transformer with padding, one part a sequence
            return torch.nested.as_nested_tensor([self(part) for part in x.unbind()])
        if x.ndim < -self.axis or x.shape[self.axis] != self.scale.shape[0]:
            raise CATError(
                f"got an output of shape {tuple(x.shape)}; this correction takes {self.scale.shape[0]} channels along "
                f"axis {self.axis}"
            )
        return per_channel(x, self.scale, self.shift, self.axis).to(x.dtype)

    def extra_repr(self) -> str:
        return f"channels={self.scale.shape[0]}, axis={self.axis}"


def per_channel(x: Tensor, scale: Tensor, shift: Tensor, axis: int) -> Tensor:
    """`x * scale + shift`, both (C,) along the axis of `x`, in the wider type of them."""
    shape = (-1, *[1] * (-axis - 1))
    return x * scale.view(shape) + shift.view(shape)
