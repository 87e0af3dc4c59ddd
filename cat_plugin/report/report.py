"""What was fitted, on what, what it gains and what it costs."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError
from cat_plugin.fitting.evidence import Evidence
from cat_plugin.fitting.scores import ErrorScores, HeldOutScores
from cat_plugin.layers.evidence import LayersEvidence
from cat_plugin.metrics import decimals
from cat_plugin.report.accuracy import AccuracyReport
from cat_plugin.report.clusters import ClusterProfile
from cat_plugin.report.figures import plot_report
from cat_plugin.report.layers import LayerCount
from cat_plugin.saving.plain import from_plain, to_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_CHANGED, MOST_NAMED = 3, 5
"""Layers that are named in the text."""


@dataclasses.dataclass(frozen=True, repr=False)
class CATReport:
    """Outcome of `apply_cat`.

    =================  ==================================================================
    field              meaning
    =================  ==================================================================
    images             calibration images the correction was fitted on
    positions          how many positions of them, for outputs that have such
    num_clusters       K
    cluster_sizes      images, or positions, in each cluster
    held_out           closeness to FP by cross-fitting; None for too few images
    layers             what became of the layers inside, and why; None where they were not
                       looked at
    evidence           which families of maps were tried, how they were weighed, and why
                       the result was or was not accepted; None in `"paper"` mode
    warnings           what makes the figures above doubtful, in words
    quantized_layers   how many layers of the quantized model look quantized
    added_parameters   numbers that the correction stores
    added_bytes        their size
    model_bytes        size of the quantized model at the bit widths of its weights, as far
                       as these show, see `cat_plugin.report.size`; None if it is not known
    collect_seconds    running both models over the calibration images
    fit_seconds        fitting the correction, and cross-fitting
    accuracy           on labelled images, where an `eval_loader` was given
    clusters           mean logits of the largest clusters on held-out images, before and
                       after; empty where nothing was held out or the output is left as it is
    =================  ==================================================================
    """

    images: int
    num_clusters: int
    cluster_sizes: tuple[int, ...]
    held_out: HeldOutScores | ErrorScores | None
    added_parameters: int
    added_bytes: int
    collect_seconds: float
    fit_seconds: float
    evidence: Evidence | None = None
    warnings: tuple[str, ...] = ()
    accuracy: AccuracyReport | None = None
    model_bytes: int | None = None
    positions: int | None = None
    layers: LayersEvidence | None = None
    quantized_layers: LayerCount | None = None
    clusters: tuple[ClusterProfile, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.num_clusters == len(self.cluster_sizes):
            raise CATError(
                f"num_clusters is {self.num_clusters}, and there are {len(self.cluster_sizes)} cluster_sizes; expected "
                "one size for each of at least one cluster"
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a JSON-able dict."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "CATReport":
        """Inverse of `to_dict`, also after JSON.

        Raises:
            CATError: a field is unknown, missing, or of another type.
        """
        return from_plain(cls, values, "the report")

    @property
    def _output_declined(self) -> bool:
        return self.evidence is not None and not self.evidence.accepted

    @property
    def _layers_corrected(self) -> bool:
        return self.layers is not None and self.layers.accepted

    def plot(self, path: str | os.PathLike[str] | None = None, *, class_names: Sequence[str] | None = None) -> "Figure":
        """The report as a figure, by matplotlib (`pip install matplotlib`).

        Shows what CAT gains, with intervals; the held-out divergence as layers were fitted, and how much is corrected
        along the network; the families of maps that were tried; which classes win and lose, by
        labels where an `eval_loader` was given, by the full-precision model's predictions on held-out images otherwise;
        and the mean logits of the largest clusters in all three models, on held-out images.

        Args:
            path: written to, in the format that its ending names, PNG without one; by default nothing is written.
            class_names: one for each class; by default classes are numbers.

        Returns:
            The figure, a `matplotlib.figure.Figure` of its own: `pyplot` and the user's style are not involved. A
            notebook shows it after `%matplotlib inline`.

        Raises:
            CATError: matplotlib is not installed, there is nothing to draw, names that are not one for each class, or a
                path in no folder or of an unknown format.
        """
        return plot_report(self, path, class_names)

    def summary(self) -> str:
        """The report in one line."""
        parts = [f"{self.images:,} images"]
        if self._layers_corrected:
            parts.append(f"{len(self.layers.layers)} layers")
        if self._output_declined:
            parts.append("output left as it is" if self._layers_corrected else "left as it is")
        else:
            parts.append(f"{self.num_clusters} cluster{'s' if self.num_clusters > 1 else ''}")
        if self.held_out:
            parts += self.held_out.summary()
        if self.accuracy:
            parts.append(f"top-1 {self.accuracy.quantized_top1:.2f} -> {self.accuracy.cat_top1:.2f} %")
        return ", ".join(parts)

    def __str__(self) -> str:
        return "\n".join(
            [
                *self._fitted(),
                self._held_out(),
                *([f"  accuracy: {self.accuracy}"] if self.accuracy else []),
                *(
                    [f"  model: {self.quantized_layers}"]
                    if self.quantized_layers and self.quantized_layers.total
                    else []
                ),
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
        images = f"{self.images:,} images" + (f" ({self.positions:,} positions)" if self.positions is not None else "")
        inside = f"{len(self.layers.layers)} layers corrected; output: " if self._layers_corrected else ""
        alone = "left as it is" if inside else "the model is left as it is"
        outcome = alone if self._output_declined else self._clusters()
        comma = ":" if inside or self.evidence is not None or self._output_declined else ","
        return [f"CAT fitted on {images}{comma} {inside}{outcome}", *self._about_layers(), *self._about_output()]

    def _clusters(self) -> str:
        kind = "images" if self.positions is None else "positions"
        sizes = f"{min(self.cluster_sizes)} to {max(self.cluster_sizes)} {kind} each"
        return f"{self.num_clusters} clusters of {sizes}" if self.num_clusters > 1 else "1 cluster"

    def _about_layers(self) -> list[str]:
        layers = self.layers
        if layers is None:
            return []
        lines = [f"  layers: {layers.reason}"]
        if layers.plain is not None:
            names = {"model": "plain", "output only": "output", "layers": "inside", "layers and output": "both"}
            known = {name: getattr(layers, field) for name, field in names.items()}
            lines.append("  held-out divergence from FP:")
            lines += [f"    {name:<20}{closeness}" for name, closeness in known.items() if closeness is not None]
        if layers.accepted:
            lines.append(
                f"  fitted in {layers.epochs} epochs of {layers.steps} steps, {layers.seconds:.0f} s; rate "
                f"{layers.rate!r}, share {layers.share:g}; {layers.operations:,} multiply-adds an image"
            )
            changed = sorted(layers.layers, key=lambda layer: -max(layer.scale, layer.shift))[:MOST_CHANGED]
            lines.append("  changed most (mean size of scale - 1, and of offsets in spreads of their channel):")
            lines += [f"    {layer.name:<30}{layer.scale:.3f}  {layer.shift:.3f}" for layer in changed]
        if layers.unreached:
            shown = ", ".join(layers.unreached[:MOST_NAMED]) + (", ..." if len(layers.unreached) > MOST_NAMED else "")
            lines.append(f"  no gradient reaches {len(layers.unreached)} layers: {shown}")
        return lines

    def _about_output(self) -> list[str]:
        evidence = self.evidence
        if evidence is None:
            return []
        lines = [f"  output: {evidence.reason}" if self.layers else f"  {evidence.reason}"]
        if evidence.candidates:
            lines.append("  tried (fall of the held-out softened KL in nats, share of the weight):")
        for candidate in evidence.candidates:
            fall = f"{decimals(candidate.kl_gain, '+')} +- {decimals(candidate.kl_gain_error)}"
            lines.append(f"    {candidate.name:<30}{fall:<17}  {candidate.weight:5.0%}")
        return lines

    def _held_out(self) -> str:
        scores = self.held_out
        if scores is None:
            return "  held out: nothing, the images are too few to split"
        return f"  held out: {scores}"

    __repr__ = __str__
