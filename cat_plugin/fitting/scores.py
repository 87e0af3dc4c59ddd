"""How close a corrected model is to full precision, on images that were held out from the fit."""

import dataclasses

import torch
from torch import Tensor

from cat_plugin.kinds import SOFTMAX, VALUE, OutputKind
from cat_plugin.metrics import ClassChanges, agreement, agreement_gain, decimals, kl_divergence, standard_error


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
    """Closeness to the full-precision model on images that were held out from the fit.

    agreement: percentage of predictions that are the same, of labels all of an image. kl: mean KL(FP || .) in nats.
    `before` is the quantized model, `after` the corrected one. gain_low, gain_high: 95 % interval of the gain in
    agreement, by paired bootstrap. classes: by the prediction of the full-precision model, how many came to agree with
    it, and how many no longer do.
    """

    agreement_before: float
    agreement_after: float
    kl_before: float
    kl_after: float
    gain_low: float
    gain_high: float
    classes: ClassChanges | None = dataclasses.field(default=None, repr=False)

    @property
    def agreement_gain(self) -> float:
        """Gain in agreement, percentage points."""
        return self.agreement_after - self.agreement_before

    def summary(self) -> list[str]:
        """What changes, in a few words each."""
        return [
            f"agreement with FP {self.agreement_before:.2f} -> {self.agreement_after:.2f} %",
            f"KL {decimals(self.kl_before)} -> {decimals(self.kl_after)} nats",
        ]

    def __str__(self) -> str:
        return (
            f"agreement with FP {self.agreement_before:.2f} -> {self.agreement_after:.2f} % "
            f"({self.agreement_gain:+.2f}, 95 % CI {self.gain_low:+.2f} to {self.gain_high:+.2f}), "
            f"KL(FP || output) {decimals(self.kl_before)} -> {decimals(self.kl_after)} nats"
        )

    @classmethod
    def of(
        cls, f: Tensor, q: Tensor, out: Tensor, images: Tensor | None = None, kind: OutputKind = SOFTMAX
    ) -> "HeldOutScores":
        """Scores of the corrected outputs `out` where the model's are `q` and those in full precision `f`, all (N, C).

        images: (N,), the image of every row, where rows are positions.
        """
        before, after = kind.agreeing(f, q), kind.agreeing(f, out)
        labels = torch.arange(f.shape[1], device=f.device)
        classes = labels.expand_as(f) if before.shape == f.shape else kind.decisions(f)
        return cls(
            agreement(f, q, kind),
            agreement(f, out, kind),
            kl_divergence(f, q, kind),
            kl_divergence(f, out, kind),
            *agreement_gain(f, q, out, images, kind),
            ClassChanges.of(classes.flatten(), before.flatten(), after.flatten(), f.shape[1]),
        )


@dataclasses.dataclass(frozen=True)
class ErrorScores:
    """Closeness of values, or of a layer, to full precision on images that were held out from the fit.

    mse_before, mse_after: mean squared difference of the quantized and of the corrected output from the full-precision
    one. mse_error: standard error of the fall.
    """

    mse_before: float
    mse_after: float
    mse_error: float

    @classmethod
    def of(cls, f: Tensor, q: Tensor, out: Tensor, images: Tensor | None) -> "ErrorScores":
        """Scores of the corrected output `out` where the model's is `q` and that in full precision `f`, all (N, C)."""
        before, after = ((rows.double() - f.double()).square().mean(dim=1) for rows in (q, out))
        return cls(before.mean().item(), after.mean().item(), standard_error(before - after, images))

    @property
    def accepted(self) -> bool:
        """Whether the error falls by more than chance."""
        return self.mse_before - self.mse_after > self.mse_error

    def summary(self) -> list[str]:
        """What changes, in a few words."""
        return [f"squared error to FP {self.mse_before:.4g} -> {self.mse_after:.4g}"]

    def __str__(self) -> str:
        return (
            f"squared error to FP {self.mse_before:.4g} -> {self.mse_after:.4g} "
            f"(fall {self.mse_before - self.mse_after:.4g} +- {self.mse_error:.4g})"
        )


def score(
    kind: OutputKind, f: Tensor, q: Tensor, out: Tensor, images: Tensor | None = None
) -> HeldOutScores | ErrorScores:
    """The scores that outputs of that kind have; arguments as of `HeldOutScores.of`."""
    return ErrorScores.of(f, q, out, images) if kind is VALUE else HeldOutScores.of(f, q, out, images, kind)
