"""What pulls each learned rounding to 0 or 1, more and more."""

from torch import Tensor


def rounding_penalty_slope(fraction: Tensor, beta: float | Tensor) -> Tensor:
    """Derivative of `1 - |2 h - 1| ** beta` by the soft rounding `h`, clamped to [0, 1] first.

    The penalty itself pulls each rounding to 0 or 1 (AdaRound, arXiv 2004.10568, eq. 24); its value is not needed.
    """
    centred = (2 * fraction - 1).clamp_(-1, 1)
    return centred.abs().pow_(beta - 1).copysign_(centred).mul_(-2 * beta)


def annealed_beta(step: int, steps: int, warm_up: float, start: float, end: float) -> float | None:
    """The penalty's exponent at `step`: `None` (no penalty) in the first `warm_up` share of `steps`, then
    falling linearly from `start` to `end`."""
    first = warm_up * steps
    if step < first:
        return None
    return end + (start - end) * max(0.0, 1 - (step - first) / (steps - first))
