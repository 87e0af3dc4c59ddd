"""What reconstruction minimises."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def prediction_difference(prediction: Tensor, fp_prediction: Tensor, temperature: float) -> Tensor:
    """``KL(FP || quantized)`` of the predicted classes, logits ``(N, C, ...)`` divided by ``temperature``; summed over
    everything but averaged over ``N`` (PD-Quant, arXiv 2212.07048, authors' code)."""
    logs, fp_logs = ((each / temperature).log_softmax(1) for each in (prediction, fp_prediction))
    return functional.kl_div(logs, fp_logs, reduction="batchmean", log_target=True)


def reconstruction_error(
    output: Tensor, target: Tensor, channel_axis: int, norm: float = 2.0, weights: Tensor | None = None
) -> Tensor:
    """``|error| ** norm``, summed over channels and averaged over the rest (BRECQ, arXiv 2102.05426, authors' code);
    ``weights``, of the same shape, are those of the elements."""
    error = output - target
    total = _PowerSum.apply(error, norm) if weights is None else (weights * error.abs().pow(norm)).sum()
    return total * (output.shape[channel_axis] / output.numel())


class _PowerSum(torch.autograd.Function):
    """``(|x| ** norm).sum()``, with one power for the value and the gradient.

    The gradient lies in memory as ``x`` does. That of ``mse_loss`` does not where channels come last, and every
    operation behind it takes ten times as long.
    """

    @staticmethod
    def forward(ctx, x, norm):
        slope = x if norm == 2 else x.abs().pow_(norm - 1).copysign_(x)
        ctx.norm = norm
        ctx.save_for_backward(slope)
        return inner_product(slope, x)

    @staticmethod
    def backward(ctx, grad):
        (slope,) = ctx.saved_tensors
        return slope * (ctx.norm * grad), None


def inner_product(a: Tensor, b: Tensor) -> Tensor:
    """``(a * b).sum()``, without the product in memory where both lie alike in memory."""
    for view in (_row_of_contiguous, _row_of_channels_last):
        rows = view(a), view(b)
        if rows[0] is not None and rows[1] is not None:
            return torch.dot(*rows)
    return (a * b).sum()


def _row_of_contiguous(x: Tensor) -> Tensor | None:
    return x.view(-1) if x.is_contiguous() else None


def _row_of_channels_last(x: Tensor) -> Tensor | None:
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x.permute(0, 2, 3, 1).view(-1)
    return None


def rounding_penalty_slope(fraction: Tensor, beta: float) -> Tensor:
    """Derivative of ``1 - |2 h - 1| ** beta`` by the soft rounding ``h``, clamped to [0, 1] first.

    The penalty itself pulls each rounding to 0 or 1 (AdaRound, arXiv 2004.10568, eq. 24); its value is not needed.
    """
    centred = (2 * fraction - 1).clamp_(-1, 1)
    return centred.abs().pow_(beta - 1).copysign_(centred).mul_(-2 * beta)


def annealed_beta(step: int, steps: int, warm_up: float, start: float, end: float) -> float | None:
    """The penalty's exponent at ``step``: ``None`` (no penalty) in the first ``warm_up`` share of ``steps``, then
    falling linearly from ``start`` to ``end``."""
    first = warm_up * steps
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / (steps - first))
