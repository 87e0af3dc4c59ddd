"""The correction as a module: matrix products, one argmax, one multiply-add."""

from typing import Any

import torch
from torch import Tensor

from cat_plugin.correction.buffers import Buffers, outside_inference_mode
from cat_plugin.errors import CATError
from cat_plugin.running.inference import without_autocast

BUFFERS = ("weight", "bias", "scale", "shift", "project", "mix")
REQUIRED = BUFFERS[:4]


class ClusterAffine(Buffers):
    """Corrects logits by the affine map of their cluster and, where there is one, a map that all clusters share.

    `out = q * scale[ids] + shift[ids] + (q @ project) @ mix`. The cluster of an image is
    `ids = argmax(q @ weight + bias)`, which is the nearest centroid, see `cat_plugin.fitting.clustering`. Holds buffers
    only, no parameters, so optimizers do not see it.

    ========  ======  =====================================================================
    buffer    shape   holds
    ========  ======  =====================================================================
    weight    (C, K)  PCA and centroids, folded
    bias      (K,)    the same
    scale     (K, C)  1 + alpha * (gamma - 1)
    shift     (K, C)  alpha * beta
    project   (C, R)  principal directions of the logits; None: no shared map
    mix       (R, C)  what the logits along them add to every class; None with `project`
    ========  ======  =====================================================================

    Computes in float32, or float64 for float64 inputs, and returns the input's dtype. In float32
    the result agrees with a float64 reference to about 1e-6 relative, except for images on a
    cluster border, which rounding may send to the neighbouring cluster. `half()` halves what is stored, not what is
    computed in; `half()` of a model that holds this module leaves the buffers as they are. Works for any number of
    images, none included, and is free of data-dependent Python, so `torch.export` and
    `torch.compile` take it.

    Raises:
        CATError: buffers of other shapes.

    Example:
        >>> import torch
        >>> from cat_plugin import ClusterAffine
        >>> shift = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # one row a cluster; the larger logit is the cluster here
        >>> correction = ClusterAffine(torch.eye(2), torch.zeros(2), torch.ones(2, 2), shift)
        >>> correction(torch.tensor([[3.0, 1.0], [1.0, 3.0]]))
        tensor([[4., 1.],
                [1., 5.]])
    """

    weight: Tensor
    bias: Tensor
    scale: Tensor
    shift: Tensor
    project: Tensor | None
    mix: Tensor | None

    @outside_inference_mode
    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        project: Tensor | None = None,
        mix: Tensor | None = None,
    ) -> None:
        super().__init__()
        buffers = {"weight": weight, "bias": bias, "scale": scale, "shift": shift}
        clusters, classes = scale.shape if scale.ndim == 2 else (0, 0)
        expected = [(classes, clusters), (clusters,), (clusters, classes), (clusters, classes)]
        shared = {"project": project, "mix": mix}
        shared = {name: tensor for name, tensor in shared.items() if tensor is not None}
        rank = mix.shape[0] if mix is not None else 0
        shapes_of_shared = {"project": (classes, rank), "mix": (rank, classes)}
        expected += [shapes_of_shared[name] for name in shared]
        buffers |= shared
        shapes = [tuple(tensor.shape) for tensor in buffers.values()]
        if clusters == 0 or classes == 0 or shapes != expected or (project is None) != (mix is None):
            found = ", ".join(f"{name} {shape}" for name, shape in zip(buffers, shapes, strict=True))
            raise CATError(
                f"got {found}; expected weight (C, K), bias (K,), scale (K, C), shift (K, C), and where there is a "
                "shared map project (C, R) with mix (R, C)"
            )
        for name in BUFFERS:
            self._hold(name, buffers.get(name))

    @classmethod
    def identity(cls, num_classes: int) -> "ClusterAffine":
        """The correction with one cluster that changes nothing."""
        zeros = torch.zeros(1, num_classes, device="cpu")
        return cls(zeros.T.contiguous(), zeros.new_zeros(1), torch.ones_like(zeros), zeros.clone())

    @property
    def num_clusters(self) -> int:
        return self.scale.shape[0]

    @property
    def num_classes(self) -> int:
        return self.scale.shape[1]

    def assign(self, q: Tensor) -> Tensor:
        """Cluster (N,) int64 of each row of the logits `q` (N, C).

        Raises:
            CATError: `q` is not floating-point, not of shape (N, C), or on another device.
        """
        self._check(q)
        q = q.to(compute_dtype(q))
        if self.num_clusters == 1:
            return torch.zeros(q.shape[0], dtype=torch.int64, device=q.device)
        with without_autocast(q):  # in half precision images near a border would change clusters
            return self._scores(q).argmax(dim=1)

    def forward(self, q: Tensor) -> Tensor:
        """Corrected logits (N, C) in the dtype of `q` (N, C). Raises as `assign` does."""
        dtype = compute_dtype(q)
        ids = self.assign(q)
        scale, shift = (self.scale, self.shift) if self.num_clusters == 1 else (self.scale[ids], self.shift[ids])
        out = q.to(dtype) * scale.to(dtype) + shift.to(dtype)
        if self.mix is not None:
            with without_autocast(q):
                out = out + (q.to(dtype) @ self.project.to(dtype)) @ self.mix.to(dtype)
        return out.to(q.dtype)

    def half(self) -> "ClusterAffine":
        """Stores the buffers in float16, half as large as in float32, and changes outputs by about 1e-3 relative.

        Raises:
            CATError: a value is too large for float16.
        """
        return self._stored(torch.float16)

    def bfloat16(self) -> "ClusterAffine":
        """Stores the buffers in bfloat16, which has the range of float32 and fewer digits than float16."""
        return self._stored(torch.bfloat16)

    def float(self) -> "ClusterAffine":
        """Stores the buffers in float32."""
        return self._stored(torch.float32)

    def double(self) -> "ClusterAffine":
        """Stores the buffers in float64."""
        return self._stored(torch.float64)

    def to(self, *args: Any, **kwargs: Any) -> "ClusterAffine":
        """As of any module; a dtype acts as `half()` and the like do."""
        super().to(*args, **kwargs)
        dtype = next((given for given in (*args, *kwargs.values()) if isinstance(given, torch.dtype)), None)
        return self if dtype is None else self._stored(dtype)

    def extra_repr(self) -> str:
        rank = "" if self.mix is None else f"rank={self.mix.shape[0]}, "
        return f"clusters={self.num_clusters}, classes={self.num_classes}, {rank}{self.num_bytes} bytes"

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

    @outside_inference_mode
    def _stored(self, dtype: torch.dtype) -> "ClusterAffine":
        buffers = dict(self.named_buffers())
        rounded = {
            name: buffer.to(dtype)
            for name, buffer in (_balanced(buffers) if dtype == torch.float16 else buffers).items()
        }
        for name, buffer in buffers.items():
            if (rounded[name].isinf() & buffer.isfinite()).any():
                raise CATError(f"{name} reaches {buffer.abs().max():.3g}, too large for {dtype}; bfloat16() takes it")
        for name, buffer in rounded.items():
            setattr(self, name, buffer)
        return self


def _balanced(buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same correction with values that fit a narrow range, by powers of two, which round nothing.

    A common factor of `weight` and `bias` changes no argmax. What a row of `mix` gains a column of `project` loses.
    """
    buffers = dict(buffers)
    peak = torch.stack([_peak(buffers["weight"].flatten()), _peak(buffers["bias"])]).max()
    factor = torch.exp2(15 - peak.log2().ceil())
    buffers["weight"], buffers["bias"] = buffers["weight"] * factor, buffers["bias"] * factor
    if "mix" in buffers:
        factor = torch.exp2(((_peak(buffers["mix"].T) / _peak(buffers["project"])).log2() / 2).round())
        buffers["project"], buffers["mix"] = buffers["project"] * factor, buffers["mix"] / factor.unsqueeze(1)
    return buffers


def _peak(values: Tensor) -> Tensor:
    """Largest finite absolute value of each column, float32, and a tiny one for a column of zeros."""
    return torch.where(values.isfinite(), values, 0).float().abs().amax(dim=0).clamp(min=2.0**-60)


def compute_dtype(q: Tensor) -> torch.dtype:
    """What corrections of the logits `q` are computed in."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
