"""Accuracy of the three models on the same labelled images."""

import dataclasses
from typing import Any

from cat_plugin.metrics import ClassChanges, PairedStatistics
from cat_plugin.saving.plain import to_plain


@dataclasses.dataclass(frozen=True)
class AccuracyReport:
    """Accuracies in percent of the same labelled images, and the paired comparison of CAT with the quantized model.

    `top5` figures count the `top_k = min(5, classes)` largest logits. positions: how many positions of the images were
    labelled and counted, for outputs that have such. classes: which classes won and lost by CAT.
    """

    images: int
    top_k: int
    fp_top1: float
    quantized_top1: float
    cat_top1: float
    fp_top5: float
    quantized_top5: float
    cat_top5: float
    paired: PairedStatistics
    positions: int | None = None
    classes: ClassChanges | None = dataclasses.field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return to_plain(self)

    def __str__(self) -> str:
        paired, counted = self.paired, f"{self.images:,} images"
        if self.positions is not None:
            counted = f"{self.positions:,} positions of {counted}"
        return (
            f"top-1 of {counted}: FP {self.fp_top1:.2f}, quantized {self.quantized_top1:.2f}, "
            f"with CAT {self.cat_top1:.2f} ({paired.delta:+.2f}, "
            f"95 % CI {paired.ci_low:+.2f} to {paired.ci_high:+.2f}, "
            f"p = {paired.p_value:.2g}, {paired.won} won, {paired.lost} lost); "
            f"top-{self.top_k}: {self.fp_top5:.2f}, {self.quantized_top5:.2f}, {self.cat_top5:.2f}"
        )
