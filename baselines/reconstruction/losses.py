"""What reconstruction minimises."""

import torch
from torch import Tensor
from torch.nn import functional

from baselines.quantization.operations import inner_product


def prediction_difference(prediction: Tensor, fp_prediction: Tensor, temperature: float) -> Tensor:
    """`KL(FP || quantized)` of the predicted classes, logits (N, C, ...) divided by `temperature`; summed over
    everything but averaged over `N` (PD-Quant, arXiv 2212.07048, authors' code)."""
    logs, fp_logs = ((each / temperature).log_softmax(1) for each in (prediction, fp_prediction))
    return functional.kl_div(logs, fp_logs, reduction="batchmean", log_target=True)


def reconstruction_error(
    output: Tensor, target: Tensor, channel_axis: int, norm: float = 2.0, weights: Tensor | None = None
) -> Tensor:
    """`|error| ** norm`, summed over channels and averaged over the rest (BRECQ, arXiv 2102.05426, authors' code);
    `weights`, of the same shape, are those of the elements."""
    error = output - target
    total = _PowerSum.apply(error, norm) if weights is None else (weights * error.abs().pow(norm)).sum()
    return total * (output.shape[channel_axis] / output.numel())


class _PowerSum(torch.autograd.Function):
    """`(|x| ** norm).sum()`, with one power for the value and the gradient.

    The gradient lies in memory as `x` does. That of `mse_loss` does not where channels come last, and every
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
