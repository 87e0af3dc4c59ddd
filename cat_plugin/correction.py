"""The correction as a module: one matrix product, one argmax, one multiply-add."""

import torch
from torch import Tensor, nn

from cat_plugin.errors import CATError


class ClusterAffine(nn.Module):
    """Corrects logits by the affine map of their cluster: `out = q * scale[ids] + shift[ids]`.

    The cluster of an image is `ids = argmax(q @ weight + bias)`, which is the nearest centroid, see
    `cat_plugin.clustering`. Holds buffers only, no parameters, so optimizers do not see it.

    ======  ======  ==================================================
    buffer  shape   holds
    ======  ======  ==================================================
    weight  (C, K)  PCA and centroids, folded
    bias    (K,)    the same
    scale   (K, C)  1 + alpha * (gamma - 1)
    shift   (K, C)  alpha * beta
    ======  ======  ==================================================

    Computes in float32, or float64 for float64 inputs, and returns the input's dtype. In float32
    the result agrees with a float64 reference to about 1e-6 relative, except for images on a
    cluster border, which rounding may send to the neighbouring cluster. Works for any number of
    images, none included, and is free of data-dependent Python, so `torch.export` and
    `torch.compile` take it.
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> None:
        super().__init__()
        buffers = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
        clusters, classes = scale.shape if scale.ndim == 2 else (0, 0)
        expected = [(classes, clusters), (clusters,), (clusters, classes), (clusters, classes)]
        if clusters == 0 or classes == 0 or [tuple(tensor.shape) for tensor in buffers.values()] != expected:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in buffers.items())
            raise CATError(f"got {shapes}; expected weight (C, K), bias (K,), scale (K, C), shift (K, C)")
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor.detach())

    @classmethod
    def identity(cls, num_classes: int) -> "ClusterAffine":
        """The correction with one cluster that changes nothing."""
        zeros, ones = torch.zeros(1, num_classes), torch.ones(1, num_classes)
        return cls(zeros.T.contiguous(), torch.zeros(1), ones, zeros.clone())

    @property
    def num_clusters(self) -> int:
        return self.scale.shape[0]

    @property
    def num_classes(self) -> int:
        return self.scale.shape[1]

    @property
    def num_parameters(self) -> int:
        """Numbers stored in the buffers."""
        return sum(buffer.numel() for buffer in self.buffers())

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self.buffers())

    def assign(self, q: Tensor) -> Tensor:
        """Cluster (N,) int64 of each row of the logits `q` (N, C).

        Raises:
            CATError: `q` is not floating-point, not of shape (N, C), or on another device.
        """
        self._check(q)
        q = q.to(_compute_dtype(q))
        if self.num_clusters == 1:
            return torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        if not q.is_meta and torch.is_autocast_enabled(q.device.type):
            # In half precision images near a border would change clusters.
            with torch.autocast(q.device.type, enabled=False):
                return self._scores(q).argmax(dim=1)
        return self._scores(q).argmax(dim=1)

    def forward(self, q: Tensor) -> Tensor:
        """Corrected logits (N, C) in the dtype of `q` (N, C). Raises as `assign` does."""
        dtype = _compute_dtype(q)
        ids = self.assign(q)
        scale, shift = self.scale.to(dtype), self.shift.to(dtype)
        if self.num_clusters > 1:
            scale, shift = scale[ids], shift[ids]
        return (q.to(dtype) * scale + shift).to(q.dtype)

    def extra_repr(self) -> str:
        return f"clusters={self.num_clusters}, classes={self.num_classes}, {self.num_bytes} bytes"

    def _scores(self, q: Tensor) -> Tensor:
        return q @ self.weight.to(q.dtype) + self.bias.to(q.dtype)

    def _check(self, q: Tensor) -> None:
        if q.ndim != 2 or q.shape[1] != self.num_classes or not q.is_floating_point():
            raise CATError(
                f"got logits of shape {tuple(q.shape)} and dtype {q.dtype}; "
                f"this correction takes floating-point (N, {self.num_classes})"
            )
        if q.device != self.scale.device:
            raise CATError(f"logits are on {q.device}, the correction on {self.scale.device}; move it with .to(...)")

    def _apply(self, fn, recurse: bool = True):
        # half() of a model that holds this module must move the buffers but not round them.
        def keep_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(keep_dtype, recurse)


def _compute_dtype(q: Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32
