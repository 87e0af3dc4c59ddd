"""How close a corrected model is to full precision, on images that were held out from the fit."""

import dataclasses

from torch import Tensor

from cat_plugin.metrics import ClassChanges, agreement, agreement_gain, kl_divergence


@dataclasses.dataclass(frozen=True)
class HeldOutScores:
    """Closeness to the full-precision model on images that were held out from the fit.

    agreement: percentage of images with the same argmax. kl: mean KL(FP || .) in nats. `before` is
    the quantized model, `after` the corrected one. gain_low, gain_high: 95 % interval of the gain in agreement,
    by paired bootstrap. classes: by the argmax of the full-precision model, how many images came to agree with it, and
    how many no longer do.
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
            f"KL {self.kl_before:.4f} -> {self.kl_after:.4f} nats",
        ]

    def __str__(self) -> str:
        return (
            f"agreement with FP {self.agreement_before:.2f} -> {self.agreement_after:.2f} % "
            f"({self.agreement_gain:+.2f}, 95 % CI {self.gain_low:+.2f} to {self.gain_high:+.2f}), "
            f"KL(FP || output) {self.kl_before:.4f} -> {self.kl_after:.4f} nats"
        )

    @classmethod
    def of(cls, f: Tensor, q: Tensor, out: Tensor, images: Tensor | None = None) -> "HeldOutScores":
        """Scores of the corrected logits `out` of images with logits `q` and full-precision logits `f`, all (N, C).

        images: (N,), the image of every row, where rows are positions.
        """
        target = f.argmax(dim=1)
        return cls(
            agreement(f, q),
            agreement(f, out),
            kl_divergence(f, q),
            kl_divergence(f, out),
            *agreement_gain(f, q, out, images),
            ClassChanges.of(target, q.argmax(dim=1) == target, out.argmax(dim=1) == target, f.shape[1]),
        )
