"""What held-out images are judged by: how far logits are from full-precision ones, in one of several senses."""

import dataclasses
import math
from collections.abc import Callable

from scipy.optimize import minimize_scalar
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False)
class Criterion:
    """A loss of single images, and how it is spoken of.

    label, unit: of the loss, the unit with a space before it. target: what `loss` compares with, from full-precision
    logits (N, C) and a temperature. loss: (N,), of logits (N, C), the target and the same temperature, which matters
    to softened losses only. demanded: whether the loss has to fall for a correction to be used.
    """

    label: str
    unit: str
    target: Callable[[Tensor, float], Tensor]
    loss: Callable[[Tensor, Tensor, float], Tensor]
    demanded: bool = True

    def change(self, fall: float, error: float) -> str:
        """In words: by how much the loss falls, and the standard error of that."""
        verb = "falls" if fall > 0 else "does not fall, it rises"
        return f"{self.label} {verb} by {abs(fall):.4f} +- {error:.4f}{self.unit}"


def softened(f: Tensor, temperature: float) -> Tensor:
    """(N, C) predictions of the logits `f` (N, C), softened by a temperature."""
    return (f / temperature).softmax(dim=1)


def softened_divergence(output: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """(N,) cross-entropy of predictions against those of the teacher, (N, C), softened by the same temperature, at the
    scale of `output` (N, C) that makes its mean smallest."""
    scaled = best_scale(output / temperature, teacher) * output / temperature
    return scaled.logsumexp(dim=1) - (teacher * scaled).sum(dim=1)


def best_scale(logits: Tensor, teacher: Tensor) -> float:
    """The factor of `logits` (N, C) that brings their softmax nearest to `teacher` on average."""
    spread = logits.var(dim=1, correction=0).mean().sqrt().item()
    if not spread > 1e-12:
        return 1.0  # all classes alike, as where there is but one: no factor changes a prediction
    inner, unit = (teacher * logits).sum(dim=1).mean(), math.log(spread)
    found = minimize_scalar(
        lambda log_scale: ((math.exp(log_scale) * logits).logsumexp(dim=1).mean() - math.exp(log_scale) * inner).item(),
        bounds=(math.log(0.01) - unit, math.log(1000) - unit),
        method="bounded",
        options={"xatol": 1e-3},
    )
    return math.exp(found.x)


def _divergence(output: Tensor, teacher: Tensor, _: float) -> Tensor:
    return output.logsumexp(dim=1) - (teacher * output).sum(dim=1)


def centred(logits: Tensor) -> Tensor:
    """Without what all classes of an image have in common, which changes no prediction."""
    return logits - logits.mean(dim=1, keepdim=True)


def _squared_error(output: Tensor, target: Tensor, _: float) -> Tensor:
    return (centred(output) - target).square().mean(dim=1)


def _disagreement(output: Tensor, classes: Tensor, _: float) -> Tensor:
    """In percent, so that its mean is in percentage points."""
    return 100.0 * (output.argmax(dim=1) != classes).double()


SOFTENED_KL = Criterion("softened KL", " nats", softened, softened_divergence)

CRITERIA = {
    "softened_kl": SOFTENED_KL,
    "kl": Criterion("KL", " nats", lambda f, _: f.softmax(dim=1), _divergence),
    "squared_error": Criterion("squared error of the logits", "", lambda f, _: centred(f), _squared_error),
    "agreement": Criterion("disagreement with FP", " percentage points", lambda f, _: f.argmax(dim=1), _disagreement),
    "none": dataclasses.replace(SOFTENED_KL, demanded=False),
}
"""By the name that `CATConfig.criterion` gives them."""
