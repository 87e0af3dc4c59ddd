"""Uniform asymmetric quantizers: ``x -> (clamp(round(x / scale) + zero_point, 0, levels) - zero_point) * scale``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from baselines.ranges import activation_range, weight_range

# Stretch of the sigmoid (AdaRound, arXiv 2004.10568, eq. 23), so that rounding reaches exactly 0 and 1.
GAMMA, ZETA = -0.1, 1.1


class WeightQuantizer(nn.Module):
    """Grid of one layer's weights: ``scale`` and ``zero_point``, both buffers of shape ``(channels, 1, ...)``."""

    def __init__(self, weight: Tensor, bits: int, range_method: str = "mse") -> None:
        super().__init__()
        self.bits = bits
        shape = (-1,) + (1,) * (weight.dim() - 1)
        scale, zero_point = weight_range(weight, bits, range_method)
        self.register_buffer("scale", scale.to(weight.dtype).view(shape))
        self.register_buffer("zero_point", zero_point.to(weight.dtype).view(shape))

    @property
    def levels(self) -> int:
        """The largest integer of the grid."""
        return 2**self.bits - 1

    def dequantize(self, integers: Tensor) -> Tensor:
        """Weights for integers of the grid; those outside are clipped to it."""
        return (integers.clamp(0, self.levels) - self.zero_point) * self.scale

    def floor(self, weight: Tensor) -> Tensor:
        """The integer below each weight (not clipped): what rounding adds 0 or 1 to."""
        return (weight / self.scale).floor() + self.zero_point

    def forward(self, weight: Tensor) -> Tensor:
        """Round to nearest."""
        return self.dequantize((weight / self.scale).round() + self.zero_point)

    def extra_repr(self) -> str:
        return f"bits={self.bits}, channels={self.scale.numel()}"


class ActivationQuantizer(nn.Module):
    """Quantizer of one activation tensor: ``scale`` is a parameter (it can be learned), ``zero_point`` a buffer.

    While a unit is being reconstructed (:meth:`training_with`), :attr:`keep` may hold the probability that an element
    is quantized at all (QDrop, arXiv 2203.05740, eq. 7; the authors' code calls this probability ``drop_prob``); the
    others pass in floating point. :attr:`bypass` passes everything.
    """

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits
        self.scale = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros(()))
        self.bypass = False
        self.keep = 1.0
        self.generator: torch.Generator | None = None
        self._lowest = 0.0

    @property
    def levels(self) -> int:
        """The largest integer of the grid."""
        return 2**self.bits - 1

    def set_range(self, values: Tensor, method: str = "mse") -> None:
        """Choose scale and zero point for a sample of the tensor."""
        scale, zero_point = activation_range(values, self.bits, method)
        self.scale.data.copy_(scale)
        self.zero_point.copy_(zero_point)

    def forward(self, x: Tensor) -> Tensor:
        if self.bypass:
            return x
        if not torch.is_grad_enabled() or not (self.scale.requires_grad or self.keep < 1):
            steps = (x / self.scale).round() + self.zero_point
            return (steps.clamp(0, self.levels) - self.zero_point) * self.scale
        return self.mix(x)

    def mix(self, x: Tensor, otherwise: Tensor | None = None) -> Tensor:
        """Quantized ``x`` where a coin of probability :attr:`keep` says so, else ``otherwise`` (or ``x`` itself)."""
        mask = None if self.keep >= 1 else coin_flips(x, self.keep, self.generator)
        return _QuantizeOrKeep.apply(x, otherwise, self.scale, self._lowest, self._lowest + self.levels, mask)

    @contextlib.contextmanager
    def training_with(self, keep: float, bypass: bool, generator: torch.Generator) -> Iterator[None]:
        """Set the quantizer up for reconstruction; everything is as before afterwards, whatever happens."""
        before = self.keep, self.bypass, self.generator
        self.keep, self.bypass, self.generator = keep, bypass, generator
        self._lowest = -self.zero_point.item()  # read once: on a GPU every reading waits for all work before it
        try:
            yield
        finally:
            self.keep, self.bypass, self.generator = before

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def coin_flips(like: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Zeros and ones in the shape, type and memory format of ``like``, ones with ``probability``.

    An element costs one random byte, so the probability is rounded to the nearest 1/256. Numbers and not booleans: on
    the CPU, arithmetic with booleans and ``torch.where`` take 5 to 30 times as long.
    """
    count = like.numel()
    words = torch.empty(-(-count // 8), dtype=torch.int64, device=like.device)
    words.random_(-(2**63), None, generator=generator)
    flips = words.view(torch.uint8)[:count].to(like.dtype).neg_().add_(round(probability * 256)).clamp_(0, 1)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        batch, channels, height, width = like.shape
        return flips.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flips.view(like.shape)


class _QuantizeOrKeep(torch.autograd.Function):
    """Fake quantization with the straight-through gradients of LSQ (arXiv 1902.08153, eq. 3 and 5) and QDrop's mask.

    Where the mask is 0, value and gradient come from ``otherwise``, a constant, or from ``x`` where that is None.
    """

    @staticmethod
    def forward(ctx, x, otherwise, scale, lowest, highest, mask):
        steps = x / scale
        rounded = steps.round()
        clipped = rounded.clamp(lowest, highest)
        outside = rounded.sub_(clipped).abs_().clamp_(max=1)
        out = clipped * scale
        if mask is not None:
            out = torch.lerp(x if otherwise is None else otherwise, out, mask)
        ctx.constant_otherwise = otherwise is not None
        ctx.save_for_backward(steps, clipped, outside, mask)
        return out

    @staticmethod
    def backward(ctx, grad):
        steps, clipped, outside, mask = ctx.saved_tensors
        needs_x, _, needs_scale = ctx.needs_input_grad[:3]
        quantized = grad if mask is None else grad * mask
        stopped = quantized * outside
        grad_x = grad_scale = None
        if needs_x:
            grad_x = (quantized if ctx.constant_otherwise else grad) - stopped
        if needs_scale:  # rounding error inside the range, the end of the range outside
            grad_scale = quantized.mul(clipped - steps).addcmul_(stopped, steps).sum()
        return grad_x, None, grad_scale, None, None, None


class Rounding:
    """The learned roundings of all layers of one unit, as one flat tensor (AdaRound, arXiv 2004.10568, eq. 21 to 24).

    One tensor, so that the soft weights, their regulariser and the optimiser step cost a handful of operations
    per iteration however many layers the unit has.
    """

    def __init__(self, weights: list[Tensor], quantizers: list[WeightQuantizer]) -> None:
        self._shapes = [weight.shape for weight in weights]
        self._sizes = [weight.numel() for weight in weights]

        def flat(values: list[Tensor]) -> Tensor:
            return torch.cat([v.expand(s).reshape(-1) for v, s in zip(values, self._shapes, strict=True)])

        self._scale = flat([q.scale for q in quantizers])
        self._zero_point = flat([q.zero_point for q in quantizers])
        self._levels = flat([torch.full_like(q.scale, q.levels) for q in quantizers])
        self._floor = flat([q.floor(w.detach()) for w, q in zip(weights, quantizers, strict=True)])
        rest = flat([w.detach() for w in weights]) / self._scale - (self._floor - self._zero_point)
        self.logit = (-((ZETA - GAMMA) / (rest - GAMMA) - 1).log()).requires_grad_()

    def soft(self) -> tuple[list[Tensor], Tensor]:
        """Weights with the current soft rounding (differentiable), and that rounding, flat, in [0, 1]."""
        fraction = (self.logit.sigmoid() * (ZETA - GAMMA) + GAMMA).clamp(0, 1)
        return self._weights(fraction), fraction

    def hard(self) -> list[Tensor]:
        """Weights on the grid: every rounding decided."""
        return self._weights((self.logit.detach() >= 0).to(self._floor.dtype))

    def _weights(self, fraction: Tensor) -> list[Tensor]:
        integers = torch.minimum((self._floor + fraction).clamp(min=0), self._levels)
        flat = (integers - self._zero_point) * self._scale
        return [part.view(shape) for part, shape in zip(flat.split(self._sizes), self._shapes, strict=True)]
