"""Figures of a report, drawn by matplotlib where it is installed."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cat_plugin.errors import CATError
from cat_plugin.fitting.evidence import Candidate, Evidence
from cat_plugin.fitting.scores import ErrorScores, HeldOutScores
from cat_plugin.layers.evidence import LayersEvidence
from cat_plugin.metrics import ClassChanges
from cat_plugin.report.accuracy import AccuracyReport
from cat_plugin.report.clusters import ClusterProfile
from cat_plugin.report.layer_figures import draw_curve, draw_sizes
from cat_plugin.saving.files import replacing
from cat_plugin.saving.names import check_class_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Colours of Okabe and Ito, which people with any colour vision tell apart; markers tell them apart without colour.
FP, QUANTIZED, CORRECTED = ("#000000", "o"), ("#E69F00", "s"), ("#009E73", "^")
WON, LOST = "#0072B2", "#D55E00"
BACKGROUND = "white"  # of its own, so that a figure reads the same on a light and on a dark page
DPI = 150
SMALL = "small"
CLUSTERS_DRAWN = 4
CLASSES_DRAWN = 16
"""With more classes that change than this, those at either end are drawn."""
NAME_LENGTH = 20


class Drawable(Protocol):
    """What is drawn of a `CATReport`."""

    accuracy: AccuracyReport | None
    held_out: HeldOutScores | ErrorScores | None
    evidence: Evidence | None
    clusters: Sequence[ClusterProfile]
    num_clusters: int
    positions: int | None
    layers: LayersEvidence | None


def plot_report(
    report: Drawable, path: str | os.PathLike[str] | None = None, class_names: Sequence[str] | None = None
) -> "Figure":
    """See `CATReport.plot`."""
    target = None if path is None else _writable(path)
    names = _checked_names(report, class_names)
    panels, clusters = _summary_panels(report, names), report.clusters[:CLUSTERS_DRAWN]
    layers = report.layers if report.layers is not None and report.layers.curve else None
    if not panels and not clusters and layers is None:
        raise CATError("the report holds nothing to draw: no labelled images, and no agreement on held-out images")
    with plain_style():
        heights = [height for height, there in ((4.0, panels), (3.5, layers), (5.0, clusters)) if there]
        figure = new_figure(12, sum(heights))
        parts = iter(figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0])
        if panels:
            axes = next(parts).subplots(1, len(panels), squeeze=False)[0]
            for axis, draw in zip(axes, panels, strict=True):
                draw(axis)
        if layers is not None:
            curve, sizes = next(parts).subplots(1, 2, squeeze=False, width_ratios=(1, 2))[0]
            draw_curve(curve, layers)
            draw_sizes(sizes, layers)
        if clusters:
            kind = "images" if report.positions is None else "positions"
            draw_clusters(next(parts), clusters, report.num_clusters, names, f"{kind} held out")
        if target is not None:
            save_figure(figure, target)
    return figure


@contextmanager
def plain_style() -> Iterator[None]:
    """matplotlib's own style, whatever the user's is: a dark one would draw white on white."""
    try:
        from matplotlib import style
    except ImportError:
        yield
        return
    with style.context("default"):
        yield


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a figure, whole or not at all, in the format that the ending of `path` names; PNG without one."""
    with replacing(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:] or "png", dpi=DPI, facecolor=BACKGROUND)


def draw_clusters(
    part: "Figure",
    clusters: Sequence[ClusterProfile],
    num_clusters: int,
    names: Sequence[str] | None,
    images: str,
) -> None:
    """A column a cluster: above, mean logits in all three models; below, how far they are from full precision.

    `images` says which ones these are means over.
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
        labels = [readable(label, names) for label in profile.classes]
        turned = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
        differences.set_xticks(places, labels, fontsize="x-small", **turned)
        where = "1 cluster" if num_clusters == 1 else f"cluster {profile.cluster}"
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


def draw_classes(
    panel: "Axes", changes: ClassChanges, title: str, names: Sequence[str] | None = None, kind: str = "images"
) -> None:
    """A bar to the right for what every class won, to the left for what it lost; a mark at the difference.

    Classes of which nothing changed are left out. `kind` says what is counted.
    """
    from matplotlib.ticker import MaxNLocator

    rows = zip(changes.labels, changes.won, changes.lost, strict=True)
    rows = sorted(rows, key=lambda row: (row[1] - row[2], row[1], -row[0]))
    found = len(rows)
    if found > CLASSES_DRAWN:
        half = CLASSES_DRAWN // 2
        rows = rows[:half] + rows[-half:]
        title = f"{title}\n{half} classes at either end of {found} that change"
    elif found < changes.num_classes:
        title = f"{title}\n{found} of {changes.num_classes:,} classes change"
    panel.set_title(title, fontsize=SMALL)
    panel.set_xlabel(kind, fontsize=SMALL)
    panel.axvline(0, color="black", linewidth=0.8)
    if not rows:
        panel.set_yticks([])
        return
    labels, won, lost = zip(*rows, strict=True)
    places = range(len(rows))
    panel.barh(places, won, color=WON, label="won")
    panel.barh(places, [-count for count in lost], color=LOST, hatch="///", edgecolor="white", label="lost")
    net = [gain - loss for gain, loss in zip(won, lost, strict=True)]
    panel.plot(net, places, "D", color="black", markersize=4, label="difference")
    panel.set_yticks(places, [readable(label, names) for label in labels], fontsize="x-small")
    panel.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    panel.xaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")
    panel.legend(fontsize="x-small", frameon=False, loc="lower right")


def readable(label: int, names: Sequence[str] | None) -> str:
    """The name of a class on an axis: shortened, and without a meaning as a formula."""
    name = str(label) if names is None else names[label]
    return (name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…").replace("$", r"\$")


def _summary_panels(report: Drawable, names: Sequence[str] | None) -> list[Callable[["Axes"], None]]:
    """What there is to draw of the whole model, as functions that draw it."""
    panels: list[Callable[[Axes], None]] = []
    accuracy, held_out = report.accuracy, report.held_out
    agreement = held_out if isinstance(held_out, HeldOutScores) else None  # values have no predictions that agree
    gains = {}
    if accuracy is not None:
        kind, count = _counted(accuracy.images, accuracy.positions)
        label = f"top-1, {count:,} labelled {kind} (FP {accuracy.fp_top1:.2f} %)"
        scores = f"{accuracy.quantized_top1:.2f} -> {accuracy.cat_top1:.2f} %"
        gains[f"{label}\n{scores}"] = accuracy.paired.delta, accuracy.paired.ci_low, accuracy.paired.ci_high
    if agreement is not None:
        label = f"agreement with FP, held out\n{agreement.agreement_before:.2f} -> {agreement.agreement_after:.2f} %"
        gains[label] = agreement.agreement_gain, agreement.gain_low, agreement.gain_high
    if gains:
        panels.append(lambda panel: _draw_gains(panel, gains))
    if report.evidence is not None and report.evidence.candidates:
        panels.append(lambda panel: _draw_candidates(panel, report.evidence.candidates))
    if accuracy is not None and accuracy.classes is not None:
        title = f"labelled {kind} put right and wrong"
        panels.append(lambda panel: draw_classes(panel, accuracy.classes, title, names, kind))
    elif agreement is not None and agreement.classes is not None:
        kind, _ = _counted(report.images, report.positions)
        title = "agreement with FP won and lost, held out"
        panels.append(lambda panel: draw_classes(panel, agreement.classes, title, names, kind))
    return panels


def _counted(images: int, positions: int | None) -> tuple[str, int]:
    return ("images", images) if positions is None else ("positions", positions)


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


def _checked_names(report: Drawable, class_names: Sequence[str] | None) -> tuple[str, ...] | None:
    scores = (report.accuracy, report.held_out)
    known = [changes.num_classes for score in scores if (changes := getattr(score, "classes", None)) is not None]
    highest = max((label for profile in report.clusters for label in profile.classes), default=-1)
    if class_names is not None and not known and hasattr(class_names, "__len__"):
        known = [max(highest + 1, len(class_names))]  # a report of an earlier version does not tell more
    names = check_class_names(class_names, known[0] if known else 0)
    if names is not None and highest >= len(names):
        raise CATError(f"clusters speak of class {highest}, and there are {len(names)} class_names")
    return names


def _writable(path: str | os.PathLike[str]) -> Path:
    """The path of a file that a figure may be written to."""
    target = Path(path)
    if not target.name or target.is_dir() or not target.parent.is_dir():
        raise CATError(f"{str(path)!r} cannot be written; expected the path of a file in a folder that exists")
    new_figure(1, 1)
    from matplotlib.backend_bases import FigureCanvasBase

    known = FigureCanvasBase.get_supported_filetypes()
    if target.suffix and target.suffix[1:] not in known:
        raise CATError(f"{target} has the ending {target.suffix}; expected one of {', '.join(sorted(known))}")
    return target


def new_figure(width: float, height: float) -> "Figure":
    """A blank figure of so many inches.

    Raises:
        CATError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CATError("plots need matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained", facecolor=BACKGROUND)
