"""What was fitted, on what, what it gains and what it costs."""

import dataclasses
from typing import Any

from cat_plugin.accuracy import AccuracyReport
from cat_plugin.fit import HeldOutScores


@dataclasses.dataclass(frozen=True, repr=False)
class CATReport:
    """Outcome of `apply_cat`.

    =================  ==================================================================
    field              meaning
    =================  ==================================================================
    images             calibration images the correction was fitted on
    num_clusters       K
    cluster_sizes      images in each cluster
    held_out           closeness to FP by cross-fitting; None for a single image
    added_parameters   numbers that the correction stores
    added_bytes        their size
    collect_seconds    running both models over the calibration images
    fit_seconds        fitting the correction
    held_out_seconds   the cross-fitting
    accuracy           on labelled images, where an `eval_loader` was given
    =================  ==================================================================
    """

    images: int
    num_clusters: int
    cluster_sizes: tuple[int, ...]
    held_out: HeldOutScores | None
    added_parameters: int
    added_bytes: int
    collect_seconds: float
    fit_seconds: float
    held_out_seconds: float
    accuracy: AccuracyReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return {**dataclasses.asdict(self), "cluster_sizes": list(self.cluster_sizes)}

    def summary(self) -> str:
        """The report in one line."""
        parts = [f"{self.images:,} images", f"{self.num_clusters} clusters"]
        if self.held_out:
            scores = self.held_out
            parts.append(f"agreement with FP {scores.agreement_before:.2f} -> {scores.agreement_after:.2f} %")
            parts.append(f"KL {scores.kl_before:.4f} -> {scores.kl_after:.4f} nats")
        if self.accuracy:
            parts.append(f"top-1 {self.accuracy.quantized_top1:.2f} -> {self.accuracy.cat_top1:.2f} %")
        return ", ".join(parts)

    def __str__(self) -> str:
        sizes = f"{min(self.cluster_sizes)} to {max(self.cluster_sizes)} images each"
        lines = [f"CAT fitted on {self.images:,} images, {self.num_clusters} clusters of {sizes}"]
        if self.held_out:
            scores = self.held_out
            lines.append(
                f"  held out: agreement with FP {scores.agreement_before:.2f} -> {scores.agreement_after:.2f} %, "
                f"KL(FP || output) {scores.kl_before:.4f} -> {scores.kl_after:.4f} nats"
            )
        else:
            lines.append("  held out: nothing, one image cannot be split")
        if self.accuracy:
            lines.append(f"  accuracy: {self.accuracy}")
        lines.append(
            f"  cost: {self.added_parameters:,} numbers, {self.added_bytes:,} bytes; {self.collect_seconds:.1f} s "
            f"to run the models, {self.fit_seconds:.1f} s to fit, {self.held_out_seconds:.1f} s to score"
        )
        return "\n".join(lines)

    __repr__ = __str__
