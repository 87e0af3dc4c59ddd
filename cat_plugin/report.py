"""What was fitted, on what, what it gains and what it costs."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from cat_plugin.accuracy import AccuracyReport
from cat_plugin.fit import HeldOutScores
from cat_plugin.plain import from_plain
from cat_plugin.selection import Evidence


@dataclasses.dataclass(frozen=True, repr=False)
class CATReport:
    """Outcome of `apply_cat`.

    =================  ==================================================================
    field              meaning
    =================  ==================================================================
    images             calibration images the correction was fitted on
    num_clusters       K
    cluster_sizes      images in each cluster
    held_out           closeness to FP by cross-fitting; None for too few images
    evidence           which families of maps were tried, how they were weighed, and why
                       the result was or was not accepted; None in `"paper"` mode
    warnings           what makes the figures above doubtful, in words
    added_parameters   numbers that the correction stores
    added_bytes        their size
    model_bytes        size of the quantized model at the bit widths of its weights, as far
                       as these show, see `cat_plugin.size`; None if it is not known
    collect_seconds    running both models over the calibration images
    fit_seconds        fitting the correction, and cross-fitting
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
    evidence: Evidence | None = None
    warnings: tuple[str, ...] = ()
    accuracy: AccuracyReport | None = None
    model_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        values = dataclasses.asdict(self)
        for name in ("cluster_sizes", "warnings"):
            values[name] = list(values[name])
        if self.evidence:
            values["evidence"]["candidates"] = list(values["evidence"]["candidates"])
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CATReport":
        """Inverse of `to_dict`, also after JSON.

        Raises:
            CATError: a field is unknown, missing, or of another type.
        """
        return from_plain(cls, values, "the report")

    def summary(self) -> str:
        """The report in one line."""
        parts = [f"{self.images:,} images"]
        if self.evidence and not self.evidence.accepted:
            parts.append("left as it is")
        else:
            parts.append(f"{self.num_clusters} cluster{'s' if self.num_clusters > 1 else ''}")
        if self.held_out:
            scores = self.held_out
            parts.append(f"agreement with FP {scores.agreement_before:.2f} -> {scores.agreement_after:.2f} %")
            parts.append(f"KL {scores.kl_before:.4f} -> {scores.kl_after:.4f} nats")
        if self.accuracy:
            parts.append(f"top-1 {self.accuracy.quantized_top1:.2f} -> {self.accuracy.cat_top1:.2f} %")
        return ", ".join(parts)

    def __str__(self) -> str:
        return "\n".join(
            [
                *self._fitted(),
                self._held_out(),
                *([f"  accuracy: {self.accuracy}"] if self.accuracy else []),
                f"  cost: {self.added_parameters:,} numbers, {self.added_bytes:,} bytes{self._share()}; "
                f"{self.collect_seconds:.1f} s to run the models, {self.fit_seconds:.1f} s to fit",
                *(f"  warning: {warning}" for warning in self.warnings),
            ]
        )

    def _share(self) -> str:
        if not self.model_bytes:
            return ""
        share = self.added_bytes / self.model_bytes
        return f" on top of the {self.model_bytes:,} bytes of the model at its bit widths ({share:.2%})"

    def _fitted(self) -> list[str]:
        sizes = f"{min(self.cluster_sizes)} to {max(self.cluster_sizes)} images each"
        clusters = f"{self.num_clusters} clusters of {sizes}" if self.num_clusters > 1 else "1 cluster"
        evidence = self.evidence
        if evidence is None:
            return [f"CAT fitted on {self.images:,} images, {clusters}"]
        outcome = clusters if evidence.accepted else "the model is left as it is"
        lines = [f"CAT fitted on {self.images:,} images: {outcome}", f"  {evidence.reason}"]
        if evidence.candidates:
            lines.append("  tried (fall of the held-out softened KL in nats, share of the weight):")
        for candidate in evidence.candidates:
            figures = f"{candidate.kl_gain:+.4f} +- {candidate.kl_gain_error:.4f}  {candidate.weight:5.0%}"
            lines.append(f"    {candidate.name:<30}{figures}")
        return lines

    def _held_out(self) -> str:
        scores = self.held_out
        if scores is None:
            return "  held out: nothing, the images are too few to split"
        return (
            f"  held out: agreement with FP {scores.agreement_before:.2f} -> {scores.agreement_after:.2f} % "
            f"({scores.agreement_gain:+.2f}, 95 % CI {scores.gain_low:+.2f} to {scores.gain_high:+.2f}), "
            f"KL(FP || output) {scores.kl_before:.4f} -> {scores.kl_after:.4f} nats"
        )

    __repr__ = __str__
