"""Uniform asymmetric quantizers: ``x -> (clamp(round(x / scale) + zero_point, 0, levels) - zero_point) * scale``."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from baselines.quantization.ranges import activation_range, weight_range
from baselines.reconstruction.losses import inner_product, rounding_penalty_slope

# Stretch of the sigmoid (AdaRound, arXiv 2004.10568, eq. 23), so that rounding reaches exactly 0 and 1.
GAMMA, ZETA = -0.1, 1.1

_LOW_BIT_OF_EACH_BYTE = 0x0101010101010101


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
        self._learning, self._lowest = False, 0.0

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
        if not (self._learning and torch.is_grad_enabled()):
            steps = (x / self.scale).round() + self.zero_point
            return (steps.clamp(0, self.levels) - self.zero_point) * self.scale
        return self.mix(x)

    def mix(self, x: Tensor, otherwise: Tensor | None = None, keep: float | None = None) -> Tensor:
        """Quantized ``x`` where a coin of probability ``keep`` (default: :attr:`keep`) says so, else ``otherwise`` (or
        ``x`` itself)."""
        keep = self.keep if keep is None else keep
        mask = None if keep >= 1 else coin_flips(x, keep, self.generator)
        return _QuantizeOrKeep.apply(x, otherwise, self.scale, self._lowest, self._lowest + self.levels, mask)

    @contextlib.contextmanager
    def training_with(self, keep: float, bypass: bool, generator: torch.Generator) -> Iterator[None]:
        """Set the quantizer up for reconstruction; everything is as before afterwards, whatever happens."""
        before = self.keep, self.bypass, self.generator
        self.keep, self.bypass, self.generator, self._learning = keep, bypass, generator, True
        self._lowest = -self.zero_point.item()  # read once: on a GPU every reading waits for all work before it
        try:
            yield
        finally:
            self._learning = False
            self.keep, self.bypass, self.generator = before

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


def coin_flips(like: Tensor, probability: float, generator: torch.Generator | None) -> Tensor:
    """Zeros and ones in the shape, type and memory format of ``like``, ones with ``probability``.

    An element costs one random bit where the probability is 1/2, else one random byte, so that other probabilities
    are rounded to the nearest 1/256. Numbers and not booleans: on the CPU, arithmetic with booleans and
    ``torch.where`` take 5 to 30 times as long.
    """
    count = like.numel()
    if probability == 0.5:
        words = _random_words(-(-count // 64), like.device, generator)
        shifts = torch.arange(8, device=like.device).unsqueeze(1)
        flips = (words >> shifts).bitwise_and_(_LOW_BIT_OF_EACH_BYTE).view(torch.uint8).view(-1)[:count].to(like.dtype)
    else:
        flips = _random_words(-(-count // 8), like.device, generator).view(torch.uint8)[:count].to(like.dtype)
        flips = flips.neg_().add_(round(probability * 256)).clamp_(0, 1)
    if like.dim() == 4 and like.is_contiguous(memory_format=torch.channels_last):
        batch, channels, height, width = like.shape
        return flips.view(batch, height, width, channels).permute(0, 3, 1, 2)
    return flips.view(like.shape)


def _random_words(count: int, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """``(count,)`` int64, every bit random."""
    return torch.empty(count, dtype=torch.int64, device=device).random_(-(2**63), None, generator=generator)


class _QuantizeOrKeep(torch.autograd.Function):
    """Fake quantization with the straight-through gradients of LSQ (arXiv 1902.08153, eq. 3 and 5) and QDrop's mask.

    Where the mask is 0, value and gradient come from ``otherwise``, a constant, or from ``x`` where that is None.

    LSQ's gradient of the scale, ``round(x / scale) - x / scale`` inside of the range and its end outside, needs no
    tensor of its own: ``out`` grows in proportion when ``x`` and ``scale`` do, and so do LSQ's gradients, hence
    ``out = x * d out / d x + scale * d out / d scale`` (Euler), of which all but the last is known.
    """

    @staticmethod
    def forward(ctx, x, otherwise, scale, lowest, highest, mask):
        steps = x / scale
        out = steps.round().clamp_(lowest, highest).mul_(scale)
        if mask is not None:
            out = torch.lerp(x if otherwise is None else otherwise, out, mask, out=out)
            if otherwise is None:
                steps.mul_(mask)  # kept elements pass their gradient, as those inside of the range do
        ctx.range = lowest - 0.5, highest + 0.5
        ctx.save_for_backward(x, steps, scale, out, None if otherwise is None else mask)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, steps, scale, out, mask = ctx.saved_tensors
        quantized = grad if mask is None else grad * mask
        grad_x = torch.ops.aten.hardtanh_backward(quantized, steps, *ctx.range)  # zero outside of the range
        grad_scale = None
        if ctx.needs_input_grad[2]:
            grad_scale = (inner_product(quantized, out) - inner_product(grad_x, x)) / scale
        return grad_x if ctx.needs_input_grad[0] else None, None, grad_scale, None, None, None


class Rounding:
    """The learned roundings of all layers of one unit, as one flat tensor (AdaRound, arXiv 2004.10568, eq. 21 to 24).

    One tensor, so that the soft weights, the gradient and the optimiser step cost a handful of operations per
    iteration however many layers the unit has. Their derivatives are written out: autograd sees the soft weights, as
    leaves that :meth:`soften` writes and whose gradients :meth:`backward` takes to the logits.
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
        self._flat = torch.empty_like(self._lower)
        self.weights = [part.requires_grad_() for part in self._split(self._flat)]
        self.soften()

    @torch.no_grad()
    def soften(self) -> None:
        """Write the current soft rounding into :attr:`weights`."""
        self._sigmoid = self.logit.sigmoid()
        self._stretched = self._sigmoid * (ZETA - GAMMA) + GAMMA
        torch.addcmul(self._lower, self._gain, self._stretched.clamp(0, 1), out=self._flat)

    @torch.no_grad()
    def backward(self, penalty_weight: float, beta: float | None) -> None:
        """Set the gradient of :attr:`logit` from those of :attr:`weights`, which are dropped, and from the rounding
        penalty, if it has an exponent ``beta`` already. Weights that nothing depends on have none."""
        grads = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights]
        grad = torch.cat([layout.flatten(each) for each, layout in zip(grads, self._layouts, strict=True)])
        grad.mul_(self._gain)
        if beta is not None:
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
        self._order = sorted(range(weight.dim()), key=weight.stride, reverse=True)
        self._inverse = sorted(range(weight.dim()), key=self._order.__getitem__)

    def flatten(self, values: Tensor) -> Tensor:
        """``values``, broadcast to the shape of the weight, as one row."""
        return values.expand(self._shape).permute(self._order).reshape(-1)

    def restore(self, row: Tensor) -> Tensor:
        """The weight's view of a row."""
        return row.view([self._shape[axis] for axis in self._order]).permute(self._inverse)
