"""What the modules that correct have in common: buffers that keep their type whatever happens to the model."""

import torch
from torch import Tensor, nn

outside_inference_mode = torch.inference_mode(False)
"""Buffers that are made, moved or rounded inside of inference mode could never be part of a pass with gradients."""


class Buffers(nn.Module):
    """A module with buffers only, so that optimizers do not see it.

    `half()` of a model that holds it moves the buffers but does not round them.
    """

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        """Registers `tensor` as the buffer `name`."""
        if tensor is not None:
            tensor = tensor.clone() if tensor.is_inference() else tensor.detach()
        self.register_buffer(name, tensor)

    @property
    def num_parameters(self) -> int:
        """Numbers stored in the buffers."""
        return sum(buffer.numel() for buffer in self.buffers())

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    @outside_inference_mode
    def _apply(self, fn, recurse: bool = True):
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)
