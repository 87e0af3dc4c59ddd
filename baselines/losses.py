"""What reconstruction minimises."""

from __future__ import annotations

from torch import Tensor


def reconstruction_error(output: Tensor, target: Tensor, channel_axis: int, norm: float = 2.0) -> Tensor:
    """``|error| ** norm``, summed over channels and averaged over the rest (BRECQ, arXiv 2102.05426, authors' code)."""
    error = output - target
    powers = error.square() if norm == 2 else error.abs().pow(norm)
    return powers.sum(channel_axis).mean()


def rounding_penalty(fraction: Tensor, beta: float) -> Tensor:
    """``sum(1 - |2 h - 1| ** beta)``: pulls each soft rounding ``h`` to 0 or 1 (AdaRound, arXiv 2004.10568, eq. 24)."""
    return fraction.numel() - (2 * fraction - 1).abs().pow(beta).sum()


def annealed_beta(step: int, steps: int, warm_up: float, start: float, end: float) -> float | None:
    """The penalty's exponent at ``step``: ``None`` (no penalty) in the first ``warm_up`` share of ``steps``, then
    falling linearly from ``start`` to ``end``."""
    first = warm_up * steps
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / (steps - first))
