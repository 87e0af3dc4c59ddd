"""Figures of a report, drawn by matplotlib where it is installed."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cat_plugin.errors import CATError
from cat_plugin.files import replacing
from cat_plugin.metrics import ClassChanges
from cat_plugin.profile import ClusterProfile
from cat_plugin.selection import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from cat_plugin.report import CATReport

# Colours of Okabe and Ito, which people with any colour vision tell apart; markers tell them apart without colour.
FP, QUANTIZED, CORRECTED = ("#000000", "o"), ("#E69F00", "s"), ("#009E73", "^")
WON, LOST = "#0072B2", "#D55E00"
BACKGROUND = "white"  # of its own, so that a figure reads the same on a light and on a dark page
DPI = 150
SMALL = "small"
CLUSTERS_DRAWN = 4
CLASSES_DRAWN = 16
"""With more classes than this, those that change most are drawn."""


def plot_report(
    report: "CATReport", path: str | os.PathLike[str] | None = None, class_names: Sequence[str] | None = None
) -> "Figure":
    """See `CATReport.plot`."""
    figure_type = _figure_type()
    names = _checked_names(report, class_names)
    panels = _summary_panels(report, names)
    clusters = report.clusters[:CLUSTERS_DRAWN]
    if not panels and not clusters:
        raise CATError("the report holds nothing to draw: no images were held out, and there was no eval_loader")
    heights = [height for height, there in ((4.0, panels), (5.0, clusters)) if there]
    figure = figure_type(figsize=(12, sum(heights)), layout="constrained", facecolor=BACKGROUND)
    parts = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
    if panels:
        axes = next(parts).subplots(1, len(panels), squeeze=False)[0]
        for axis, draw in zip(axes, panels, strict=True):
            draw(axis)
    if clusters:
        draw_clusters(next(parts), clusters, report.num_clusters, names)
    if path is not None:
        save_figure(figure, Path(path))
    return figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the ending of `path` names; PNG without one."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=DPI, facecolor=BACKGROUND)


def draw_clusters(
    part: "Figure",
    clusters: Sequence[ClusterProfile],
    num_clusters: int,
    names: Sequence[str] | None = None,
    images: str = "held out",
) -> None:
    """A column a cluster: above, mean logits in all three models; below, how far they are from full precision.

    `images` says in a word which images these are.
    """
    panels = part.subplots(2, len(clusters), squeeze=False, sharey="row", sharex="col", height_ratios=(3, 2))
    for (panel, differences), profile in zip(panels.T, clusters, strict=True):
        places = range(len(profile.classes))
        for values, label, (colour, marker) in (
            (profile.fp, "full precision", FP),
            (profile.quantized, "quantized", QUANTIZED),
            (profile.corrected, "with CAT", CORRECTED),
        ):
            panel.plot(places, values, color=colour, marker=marker, markersize=5, linewidth=1, alpha=0.85, label=label)
        for values, offset, hatch, (colour, _) in (
            (profile.quantized, -0.2, "///", QUANTIZED),
            (profile.corrected, 0.2, "", CORRECTED),
        ):
            errors = [value - fp for value, fp in zip(values, profile.fp, strict=True)]
            shifted = [place + offset for place in places]
            differences.bar(shifted, errors, 0.4, color=colour, hatch=hatch, edgecolor="white")
        differences.axhline(0, color=FP[0], linewidth=0.8)
        labels = [_name(label, names) for label in profile.classes]
        differences.set_xticks(places, labels, rotation=60, fontsize="x-small")
        where = "all images" if num_clusters == 1 else f"cluster {profile.cluster}"
        panel.set_title(
            f"{where}: {profile.images:,} {images}\nKL to FP {profile.kl_before:.3f} -> {profile.kl_after:.3f} nats",
            fontsize=SMALL,
        )
        panel.grid(axis="y", linewidth=0.3)
        differences.grid(axis="y", linewidth=0.3)
    panels[0, 0].set_ylabel("mean logit, in units of\nthe model's spread", fontsize=SMALL)
    panels[1, 0].set_ylabel("less full precision", fontsize=SMALL)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    part.legend(handles, labels, loc="outside lower center", ncols=3, fontsize=SMALL, frameon=False)


def draw_classes(panel: "Axes", changes: ClassChanges, title: str, names: Sequence[str] | None = None) -> None:
    """A bar to the right for what every class won, to the left for what it lost; a mark at the difference."""
    net = [won - lost for won, lost in zip(changes.won, changes.lost, strict=True)]
    order = sorted(range(len(net)), key=lambda label: (net[label], changes.won[label], -label))
    if len(order) > CLASSES_DRAWN:
        half = CLASSES_DRAWN // 2
        title, order = f"{title}\nthe {half} classes at either end", order[:half] + order[-half:]
    places = range(len(order))
    panel.barh(places, [changes.won[label] for label in order], color=WON, label="won")
    panel.barh(
        places, [-changes.lost[label] for label in order], color=LOST, hatch="///", edgecolor="white", label="lost"
    )
    panel.plot(
        [net[label] for label in order], places, "D", color="black", markersize=4, linestyle="", label="difference"
    )
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_yticks(places, [_name(label, names) for label in order], fontsize="x-small")
    panel.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    panel.set_xlabel("images", fontsize=SMALL)
    panel.set_title(title, fontsize=SMALL)
    panel.legend(fontsize="x-small", frameon=False, loc="lower right")


def _summary_panels(report: "CATReport", names: Sequence[str] | None) -> list[Callable[["Axes"], None]]:
    """What there is to draw of the whole model, as functions that draw it."""
    panels: list[Callable[[Axes], None]] = []
    agreement = None if report.layer is not None else report.held_out
    gains = {}
    if report.accuracy is not None:
        accuracy, paired = report.accuracy, report.accuracy.paired
        label = f"top-1, {accuracy.images:,} labelled images (FP {accuracy.fp_top1:.2f} %)"
        scores = f"{accuracy.quantized_top1:.2f} -> {accuracy.cat_top1:.2f} %"
        gains[f"{label}\n{scores}"] = paired.delta, paired.ci_low, paired.ci_high
    if agreement is not None:
        label = f"agreement with FP, held out\n{agreement.agreement_before:.2f} -> {agreement.agreement_after:.2f} %"
        gains[label] = agreement.agreement_gain, agreement.gain_low, agreement.gain_high
    if gains:
        panels.append(lambda panel: _draw_gains(panel, gains))
    if report.evidence is not None and report.evidence.candidates:
        panels.append(lambda panel: _draw_candidates(panel, report.evidence.candidates))
    if report.accuracy is not None and report.accuracy.classes is not None:
        found = report.accuracy.classes
        panels.append(lambda panel: draw_classes(panel, found, "labelled images put right and wrong", names))
    elif agreement is not None and agreement.classes is not None:
        held_out = agreement.classes
        panels.append(lambda panel: draw_classes(panel, held_out, "agreement with FP won and lost, held out", names))
    return panels


def _draw_gains(panel: "Axes", gains: dict[str, tuple[float, float, float]]) -> None:
    """Gains with their 95 % intervals, beside zero."""
    places = range(len(gains) - 1, -1, -1)
    for place, (label, (gain, low, high)) in zip(places, gains.items(), strict=True):
        panel.barh(place, gain, height=0.4, color=CORRECTED[0], alpha=0.5)
        panel.plot([low, high], [place, place], color="black", linewidth=1.5, marker="|", markersize=9)
        panel.plot([gain], [place], color="black", marker="o", markersize=4)
        where = {"transform": panel.get_yaxis_transform(), "bbox": {"color": BACKGROUND, "pad": 1}}
        panel.text(0.02, place + 0.27, f"{label}: {gain:+.2f}", fontsize=SMALL, **where)
    panel.set_yticks([])
    panel.set_ylim(-0.5, len(gains) - 0.1)
    panel.axvline(0, color="black", linewidth=0.8, zorder=0)
    panel.set_xlabel("gain and its 95 % interval, percentage points", fontsize=SMALL)
    panel.set_title("what CAT gains", fontsize=SMALL)


def _draw_candidates(panel: "Axes", candidates: Sequence[Candidate]) -> None:
    """Held-out fall of the divergence by every family, with its standard error, and the family's weight."""
    places = range(len(candidates) - 1, -1, -1)
    gains = [candidate.kl_gain for candidate in candidates]
    errors = [candidate.kl_gain_error for candidate in candidates]
    panel.errorbar(gains, places, xerr=errors, fmt="o", color=CORRECTED[0], ecolor="grey", capsize=3)
    labels = [f"{candidate.name} ({candidate.weight:.0%})" for candidate in candidates]
    panel.set_yticks(places, labels, fontsize="x-small")
    panel.axvline(0, color="black", linewidth=0.8)
    panel.set_xlabel("fall of the held-out softened KL in nats, ± standard error", fontsize=SMALL)
    panel.set_title("families of maps (share of the weight)", fontsize=SMALL)


def _checked_names(report: "CATReport", class_names: Sequence[str] | None) -> list[str] | None:
    if class_names is None:
        return None
    scores = report.accuracy or report.held_out
    changes = getattr(scores, "classes", None)
    if changes is not None and len(class_names) != len(changes.won):
        raise CATError(f"class_names are {len(class_names)} names; expected one for each of {len(changes.won)} classes")
    return [str(name) for name in class_names]


def _name(label: int, names: Sequence[str] | None) -> str:
    return str(label) if names is None else names[label]


def _figure_type() -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CATError("plots need matplotlib, which is not installed: pip install 'cat-plugin[plots]'") from error
    return Figure
