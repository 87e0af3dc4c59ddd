"""Outputs with a class axis and positions: segmentation maps, sequences, feature maps. Every position is a sample."""

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from cat_plugin.errors import CATError


def class_axis_of(output: Tensor, class_axis: int | None = None) -> int:
    """The axis of classes in `output`: the last of (N, C) and of sequences (N, T, C), axis 1 of maps (N, C, H, W, ...).

    Raises:
        CATError: `class_axis`, if given, is not an axis of `output`, or the one of images.
    """
    if class_axis is None:
        return 2 if output.ndim == 3 else 1
    if not -output.ndim <= class_axis < output.ndim or class_axis % output.ndim == 0:
        raise CATError(
            f"class_axis={class_axis} for an output of shape {tuple(output.shape)}; expected one of its axes but the "
            "first, which is that of images"
        )
    return class_axis % output.ndim


def to_rows(output: Tensor, class_axis: int | None = None, binary: bool = False) -> Tensor:
    """(N * P, C) samples of `output`, which has classes along `class_axis` and P positions along the other axes.

    Logits (N, C) are their own rows. Those of an image come together. With `binary`, a single logit z is that of the
    second of two classes, `[0, z]`.
    """
    if output.ndim > 2:
        moved = output.movedim(class_axis_of(output, class_axis), -1)
        output = moved.reshape(-1, moved.shape[-1])
    return torch.cat([torch.zeros_like(output), output], dim=1) if binary else output


def from_rows(rows: Tensor, output: Tensor, class_axis: int | None = None, binary: bool = False) -> Tensor:
    """`rows` (N * P, C) in the shape of `output`; the inverse of `to_rows`."""
    if binary:
        rows = rows[:, 1:] - rows[:, :1]
    if output.ndim == 2:
        return rows
    axis = class_axis_of(output, class_axis)
    return rows.reshape(output.movedim(axis, -1).shape).movedim(-1, axis).contiguous()  # as models expect that view it


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """Positions of the images of a batch.

    shape: of the outputs. index: (rows,) int64, which of all rows are drawn, or None for all. binary: whether the
    outputs are single logits, which count as two classes.
    """

    shape: torch.Size
    class_axis: int
    index: Tensor | None
    binary: bool = False

    @property
    def dense(self) -> bool:
        """Whether the outputs have positions."""
        return len(self.shape) > 2

    @property
    def positions(self) -> int:
        """How many an image has, drawn or not."""
        return _positions(self.shape, self.class_axis)

    def rows(self, output: Tensor) -> Tensor:
        """The drawn rows (rows, C) of `output`; logits (N, C) are theirs."""
        return self._take(to_rows(output, self.class_axis, self.binary))

    def means(self, output: Tensor) -> Tensor:
        """(images, C) means over all positions, drawn or not."""
        rows = to_rows(output.detach(), self.class_axis, self.binary)
        positions = len(rows) // max(self.shape[0], 1)  # said, since of no rows it could not be told
        return rows.reshape(self.shape[0], positions, rows.shape[-1]).mean(dim=1, dtype=torch.float32)

    def labels(self, labels: Tensor | None) -> Tensor | None:
        """Labels (rows,) of the drawn rows, if `labels` are one an image, or where there are such one a position."""
        shape = [size for axis, size in enumerate(self.shape) if axis != self.class_axis]
        if labels is None or _without_ones(labels.shape) != _without_ones(shape):
            return None
        return self._take(labels.reshape(-1))

    def images(self) -> Tensor | None:
        """(rows,) int64, the image in the batch that each row belongs to; None where every row is one."""
        if not self.dense:
            return None
        images = torch.arange(self.shape[0], device="cpu")
        return self._take(images.repeat_interleave(self.positions))

    def _take(self, rows: Tensor) -> Tensor:
        return rows if self.index is None else rows[self.index.to(rows.device)]


class PositionDraw:
    """Draws up to `budget` positions of every image, others for every image; None: all of them.

    binary: whether a single logit is that of the second of two classes.
    """

    def __init__(self, class_axis: int | None, budget: int | None, seed: int, binary: bool = False) -> None:
        self._binary = binary
        self._class_axis, self._budget = class_axis, budget
        self._generator = torch.Generator("cpu").manual_seed(seed)

    def __call__(self, output: Tensor) -> Drawn:
        """Those for the images of `output`.

        Raises:
            CATError: the class axis is none of `output`.
        """
        class_axis = class_axis_of(output, self._class_axis) if output.ndim > 2 else 1
        n_images, positions = output.shape[0], _positions(output.shape, class_axis)
        binary = self._binary and output.shape[class_axis] == 1
        if self._budget is None or positions <= self._budget or n_images == 0:
            return Drawn(output.shape, class_axis, None, binary)
        shuffled = (torch.randperm(positions, generator=self._generator, device="cpu") for _ in range(n_images))
        index = torch.stack([order[: self._budget] for order in shuffled]).sort(dim=1).values
        index += positions * torch.arange(n_images, device="cpu").unsqueeze(1)
        return Drawn(output.shape, class_axis, index.flatten(), binary)


def _positions(shape: torch.Size, class_axis: int) -> int:
    """How many positions an image has in outputs of that shape."""
    return shape.numel() // max(shape[0] * shape[class_axis], 1)


def _without_ones(shape: Iterable[int]) -> list[int]:
    images, *others = shape
    return [images, *(size for size in others if size != 1)]


def fold_of_rows(images: Tensor, folds: int, seed: int) -> Tensor:
    """(N,) int64 fold of every row, the same for all rows of an image; `images` (N,) says whose they are."""
    found, index = images.unique(return_inverse=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    return (torch.randperm(len(found), generator=generator, device="cpu") % folds)[index]
