"""Learned rounding of weights."""

import torch
from torch import Tensor

from baselines.quantization.operations import axes_by_memory
from baselines.quantization.quantizers import WeightQuantizer
from baselines.reconstruction.rounding_regulariser import rounding_penalty_slope

# Stretch of the sigmoid (AdaRound, arXiv 2004.10568, eq. 23), so that rounding reaches exactly 0 and 1.
GAMMA, ZETA = -0.1, 1.1


class Rounding:
    """The learned roundings of all layers of one unit, as one flat tensor (AdaRound, arXiv 2004.10568, eq. 21 to 24).

    One tensor, so that the soft weights, the gradient and the optimiser step cost a handful of operations per
    iteration however many layers the unit has. Their derivatives are written out: autograd sees the soft weights, as
    leaves that `soften` writes and whose gradients `backward` takes to the logits.
    """

    def __init__(self, weights: list[Tensor], quantizers: list[WeightQuantizer]) -> None:
        self._layouts = [_Layout(weight) for weight in weights]

        def flat(values: list[Tensor]) -> Tensor:
            return torch.cat([layout.flatten(value) for value, layout in zip(values, self._layouts, strict=True)])

        self._scale = flat([q.scale for q in quantizers])
        self._zero_point = flat([q.zero_point for q in quantizers])
        self._levels = flat([torch.full_like(q.scale, q.levels) for q in quantizers])
        self._floor = flat([q.floor(w.detach()) for w, q in zip(weights, quantizers, strict=True)])
        rest = flat([w.detach() for w in weights]) / self._scale - (self._floor - self._zero_point)
        self.logit = (-((ZETA - GAMMA) / (rest - GAMMA) - 1).log()).requires_grad_()
        # What is clipped stays at its end of the grid, however it is rounded.
        movable = (self._floor >= 0) & (self._floor < self._levels)
        self._gain = self._scale * movable
        self._lower = self._dequantize(self._floor)
        # Written again at every step, and never replaced: a recorded step finds them where they were.
        self._flat, self._sigmoid, self._stretched = (torch.empty_like(self._lower) for _ in range(3))
        self.weights = [part.requires_grad_() for part in self._split(self._flat)]
        self.soften()

    @torch.no_grad()
    def soften(self) -> None:
        """Write the current soft rounding into `weights`."""
        torch.sigmoid(self.logit, out=self._sigmoid)
        torch.mul(self._sigmoid, ZETA - GAMMA, out=self._stretched).add_(GAMMA)
        torch.addcmul(self._lower, self._gain, self._stretched.clamp(0, 1), out=self._flat)

    @torch.no_grad()
    def backward(self, penalty_weight: float | Tensor, beta: float | Tensor | None) -> None:
        """Set the gradient of `logit` from those of `weights`, which are dropped, and from the rounding
        penalty, if it has an exponent `beta` already. Weights that nothing depends on have none."""
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        grad = torch.cat([layout.flatten(each) for each, layout in zip(grads, self._layouts, strict=True)])
        grad.mul_(self._gain)
        if isinstance(beta, Tensor):
            grad.addcmul_(rounding_penalty_slope(self._stretched, beta), penalty_weight)
        elif beta is not None:
            grad.add_(rounding_penalty_slope(self._stretched, beta), alpha=penalty_weight)
        grad = torch.ops.aten.hardtanh_backward(grad, self._stretched, 0, 1).mul_(ZETA - GAMMA)
        self.logit.grad = torch.ops.aten.sigmoid_backward(grad, self._sigmoid)
        for weight in self.weights:
            weight.grad = None

    @torch.no_grad()
    def hard(self) -> list[Tensor]:
        """Weights on the grid: every rounding decided."""
        return self._split(self._dequantize(self._floor + (self.logit >= 0).to(self._floor.dtype)))

    def _dequantize(self, integers: Tensor) -> Tensor:
        return (torch.minimum(integers.clamp(min=0), self._levels) - self._zero_point) * self._scale

    def _split(self, flat: Tensor) -> list[Tensor]:
        parts = flat.split([layout.size for layout in self._layouts])
        return [layout.restore(part) for part, layout in zip(parts, self._layouts, strict=True)]


class _Layout:
    """How a weight lies in memory, so that a flat copy lies the same way and convolutions need not rearrange it."""

    def __init__(self, weight: Tensor) -> None:
        self._shape, self.size = weight.shape, weight.numel()
        self._order = axes_by_memory(weight)
        self._inverse = sorted(range(weight.dim()), key=self._order.__getitem__)

    def flatten(self, values: Tensor) -> Tensor:
        """`values`, broadcast to the shape of the weight, as one row."""
        return values.expand(self._shape).permute(self._order).reshape(-1)

    def restore(self, row: Tensor) -> Tensor:
        """The weight's view of a row."""
        return row.view([self._shape[axis] for axis in self._order]).permute(self._inverse)
