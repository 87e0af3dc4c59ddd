"""Uniform asymmetric quantizers: `x -> (clamp(round(x / scale) + zero_point, 0, levels) - zero_point) * scale`."""

import contextlib
import functools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from baselines.quantization.operations import coin_flips, inner_product
from baselines.quantization.range_search import activation_range, weight_range


class _Quantizer(nn.Module):
    """What quantizers share: bits, which travel with the `state_dict` although they are no tensor."""

    kind: str

    def __init__(self, bits: int) -> None:
        super().__init__()
        self.bits = bits

    @property
    def levels(self) -> int:
        """The largest integer of the grid."""
        return 2**self.bits - 1

    def get_extra_state(self) -> Tensor:
        """The bits as a tensor (), of the network's type: files of tensors hold nothing else."""
        return torch.tensor(self.bits, dtype=self.scale.dtype, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """See that the state is of a quantizer of as many bits.

        Raises:
            ValueError: it is not.
        """
        if int(state) != self.bits:
            raise ValueError(
                f"the state is that of a network whose {self.kind} have {int(state)} bits where this one has "
                f"{self.bits}; load it into a network that is quantized at the same bits"
            )

    def _save_to_state_dict(self, destination: dict[str, object], prefix: str, keep_vars: bool) -> None:
        """Layers may share a quantizer, but entries of a state share no memory, which safetensors would refuse."""
        names = "scale", "zero_point"
        before = {value.data_ptr() for name, value in destination.items() if name.endswith(names)}
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in names:
            value = destination[f"{prefix}{name}"]
            if not keep_vars and value.data_ptr() in before:
                destination[f"{prefix}{name}"] = value.clone()

    def extra_repr(self) -> str:
        return f"bits={self.bits}"


class WeightQuantizer(_Quantizer):
    """Grid of one layer's weights: `scale` and `zero_point`, both buffers of shape (channels, 1, ...)."""

    kind = "weights"

    def __init__(self, weight: Tensor, bits: int, range_method: str = "mse") -> None:
        super().__init__(bits)
        shape = (-1,) + (1,) * (weight.dim() - 1)
        scale, zero_point = weight_range(weight, bits, range_method)
        self.register_buffer("scale", scale.to(weight.dtype).view(shape))
        self.register_buffer("zero_point", zero_point.to(weight.dtype).view(shape))

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
        return f"{super().extra_repr()}, channels={self.scale.numel()}"


class ActivationQuantizer(_Quantizer):
    """Quantizer of one activation tensor: `scale` is a parameter (it can be learned), `zero_point` a buffer.

    While a unit is being reconstructed (`training_with`), `keep` may hold the probability that an element
    is quantized at all (QDrop, arXiv 2203.05740, eq. 7; the authors' code calls this probability `drop_prob`); the
    others pass in floating point. `bypass` passes everything.
    """

    kind = "activations"

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.scale = nn.Parameter(torch.ones((), device="cpu"), requires_grad=False)
        self.register_buffer("zero_point", torch.zeros((), device="cpu"))
        self.bypass = False
        self.keep = 1.0
        self.generator: torch.Generator | None = None
        self._learning, self._lowest = False, 0.0

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
        """Quantized `x` where a coin of probability `keep` (default: `self.keep`) says so, else `otherwise` (or
        `x` itself)."""
        keep = self.keep if keep is None else keep
        if x.dtype == self.scale.dtype == torch.float32 and _fuses(x.device.type):
            kept = None
            if keep < 1:
                kept = torch.empty_like(x, dtype=torch.bool).bernoulli_(1 - keep, generator=self.generator)
            return _FusedQuantizeOrKeep.apply(x, otherwise, self.scale, self._lowest, self.levels, kept)
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

    def cat_straight_through(self) -> contextlib.AbstractContextManager[None]:
        """Within, the same values come with straight-through gradients. Asked for by whoever fits something around
        the network, such as corrections of its layers."""
        return self.training_with(1.0, self.bypass, self.generator)


@contextlib.contextmanager
def bypassed(quantizers: list[ActivationQuantizer], bypass: bool = True) -> Iterator[None]:
    """Within, these quantizers pass everything, or nothing where `bypass` is false; afterwards they are as before."""
    before = [quantizer.bypass for quantizer in quantizers]
    for quantizer in quantizers:
        quantizer.bypass = bypass
    try:
        yield
    finally:
        for quantizer, value in zip(quantizers, before, strict=True):
            quantizer.bypass = value


class _QuantizeOrKeep(torch.autograd.Function):
    """Fake quantization with the straight-through gradients of LSQ (arXiv 1902.08153, eq. 3 and 5) and QDrop's mask.

    Where the mask is 0, value and gradient come from `otherwise`, a constant, or from `x` where that is None.

    LSQ's gradient of the scale, `round(x / scale) - x / scale` inside of the range and its end outside, needs no
    tensor of its own: `out` grows in proportion when `x` and `scale` do, and so do LSQ's gradients, hence
    `out = x * d out / d x + scale * d out / d scale` (Euler), of which all but the last is known.
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


@functools.cache
def _fuses(device_type: str) -> bool:
    """Whether PyTorch quantizes with one kernel there, and with one that is fast: the CPU's is not."""
    if device_type == "cpu":
        return False
    x = torch.ones(2, device=device_type)
    try:
        _FusedQuantizeOrKeep.apply(x, None, torch.ones((), device=device_type), 0.0, 3, None)
    except (NotImplementedError, RuntimeError):
        return False
    return True


class _FusedQuantizeOrKeep(torch.autograd.Function):
    """The same, with booleans and PyTorch's own kernel of fake quantization, which multiplies by 1 / scale.

    Where `kept` is true, value and gradient come from `otherwise`, a constant, or from `x` where that is None. A NaN
    becomes the lowest value, but the gradient of the scale NaN.
    """

    @staticmethod
    def forward(ctx, x, otherwise, scale, lowest, levels, kept):
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
        out, inside = torch._fake_quantize_per_tensor_affine_cachemask_tensor_qparams(
            x, scale, zero_point, torch.ones_like(zero_point, dtype=torch.int64), int(lowest), int(lowest) + levels
        )
        if kept is not None:
            out = torch.where(kept, x if otherwise is None else otherwise, out)
            if otherwise is None:
                inside.logical_or_(kept)  # kept elements pass their gradient, as those inside of the range do
        ctx.save_for_backward(x, inside, scale, out, None if otherwise is None else kept)
        return out

    @staticmethod
    def backward(ctx, grad):
        x, inside, scale, out, kept = ctx.saved_tensors
        quantized = grad if kept is None else grad.masked_fill(kept, 0)
        grad_x = quantized * inside
        grad_scale = None
        if ctx.needs_input_grad[2]:
            grad_scale = (inner_product(quantized, out) - inner_product(grad_x, x)) / scale
        return grad_x if ctx.needs_input_grad[0] else None, None, grad_scale, None, None, None
