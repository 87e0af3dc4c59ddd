"""Figures of a run of `compare`: gains with intervals, classes that win and lose, logits before and after."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from benchmarks.measure.accuracy import NETWORKS, Measurement
from benchmarks.measure.comparisons import modes_in, over_seeds, summarize
from benchmarks.measure.corrections import DEFAULT_MODE, MODES, OUTPUT_MODE
from benchmarks.reports.plots import GAIN_LABEL, LINEAR_TO, STYLES, blank_figure, gain_axis, new_figure
from benchmarks.runs.row_files import LABELS, change
from benchmarks.wording import bits_name
from cat_plugin.report.figures import CLUSTERS_DRAWN, draw_clusters, plain_style, readable, save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAINS, CLASSES, LOGITS = "gains.png", "classes.png", "logits.png"
CLASSES_DRAWN = 20
"""With more classes than this, those at either end are drawn."""
HATCHES = {"plain_affine": "", "cat_paper": "///", "output": "...", "layers": "xx"}  # tell bars apart without colour


@plain_style()
def plot_comparison(folder: Path, measured: Sequence[Measurement], classes: Sequence[str] | None) -> dict[str, bool]:
    """Write all figures that can be drawn; False beside the name of each, since none is looked at before.

    Args:
        folder: of the run.
        measured: rows with their predictions.
        classes: names of the classes, in the order of the labels, if known.
    """
    drawings = {
        GAINS: draw_gains(measured),
        CLASSES: draw_changes(measured, classes),
        LOGITS: draw_logits(measured, classes),
    }
    written = {name: figure for name, figure in drawings.items() if figure is not None}
    for name, figure in written.items():
        save_figure(figure, folder / name)
    return dict.fromkeys(written, False)


def draw_gains(measured: Sequence[Measurement]) -> "Figure | None":
    """A panel a method, a group of bars a bit setting, a bar a correction: mean gain over seeds, 95 % interval
    over seeds and images."""
    methods = [(method, list(lines)) for method, lines in groupby(summarize(measured), key=lambda line: line.method)]
    drawing = new_figure(GAINS, len(methods), panel_width=2.4)
    if drawing is None:
        return None
    figure, panels = drawing
    modes = [mode for mode in MODES if any(line.mode == mode for _, lines in methods for line in lines)]
    settings = list(dict.fromkeys(bits_name(line.w_bits, line.a_bits) for _, lines in methods for line in lines))
    width = 0.8 / len(modes)
    for panel, (method, lines) in zip(panels, methods, strict=True):
        for index, mode in enumerate(modes):
            found = [line for line in lines if line.mode == mode]
            shift = (index - (len(modes) - 1) / 2) * width
            places = [settings.index(bits_name(line.w_bits, line.a_bits)) + shift for line in found]
            gains = [line.delta for line in found]
            # An interval may end at the gain, but for rounding.
            below = [max(line.delta - line.seeds_ci_low, 0) for line in found]
            above = [max(line.seeds_ci_high - line.delta, 0) for line in found]
            panel.bar(
                places, gains, width, color=STYLES[mode][0], hatch=HATCHES[mode], edgecolor="white", label=MODES[mode]
            )
            panel.errorbar(places, gains, [below, above], fmt="none", ecolor="black", elinewidth=1, capsize=2)
        panel.set_title(method, fontsize="medium")
        panel.set_xticks(range(len(settings)), settings, fontsize="small")
        gain_axis(panel)
    panels[0].set_ylabel(GAIN_LABEL)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(modes), fontsize="small", frameon=False)
    return figure


def draw_changes(measured: Sequence[Measurement], classes: Sequence[str] | None) -> "Figure | None":
    """A row a method and bit setting, a column a class: images put right less wrong, in percent of the class's images,
    mean over seeds, by the last of the corrections."""
    names, rows = zip(*class_gains(measured), strict=True)
    gains = torch.stack(rows)
    shown = _extremes(gains)
    figure = blank_figure(CLASSES, 2.5 + 0.62 * len(shown), 1.6 + 0.26 * len(names))
    if figure is None:
        return None
    from matplotlib.colors import SymLogNorm

    largest = max(gains.abs().max().item(), LINEAR_TO)
    panel = figure.subplots()
    image = panel.imshow(
        gains[:, shown].numpy(), cmap="PuOr_r", norm=SymLogNorm(LINEAR_TO, vmin=-largest, vmax=largest), aspect="auto"
    )
    for row in range(len(names)):
        for column, label in enumerate(shown):
            gain = gains[row, label].item()
            colour = "white" if abs(image.norm(gain) - 0.5) > 0.33 else "black"  # on dark, on light
            panel.text(column, row, f"{gain + 0.0:+.1f}", ha="center", va="center", fontsize=7, color=colour)
    panel.set_yticks(range(len(names)), names, fontsize="small")
    labels = [readable(label, classes) for label in shown]
    panel.set_xticks(range(len(shown)), labels, rotation=45, ha="right", rotation_mode="anchor", fontsize="small")
    which = "" if len(shown) == gains.shape[1] else f", {CLASSES_DRAWN // 2} classes at either end"
    sizes = torch.bincount(measured[0].predictions["labels"].long(), minlength=gains.shape[1])[shown]
    images = f"{sizes.min():,}" if sizes.min() == sizes.max() else f"{sizes.min():,} to {sizes.max():,}"
    title = (
        f"{MODES[modes_in(measured)[-1]]}: gain of each class in percentage points, {images} test images each{which}"
    )
    panel.set_title(title, fontsize="medium")
    figure.colorbar(image, ax=panel, shrink=0.8, ticks=[-largest, -LINEAR_TO, 0, LINEAR_TO, largest], format="%+.0f")
    return figure


def draw_logits(measured: Sequence[Measurement], classes: Sequence[str] | None) -> "Figure | None":
    """Mean logits of the largest clusters in all three networks, of the network on which CAT gains most.

    CAT is the library's default, or that for outputs where layers were not corrected.
    """
    profiled = [each for each in measured if any(profile.quantized != profile.corrected for profile in each.profiles)]
    if not profiled:
        return None
    best = max(profiled, key=lambda each: (_by_cat(each)[1], each.row.method))
    figure = blank_figure(LOGITS, 12, 5.4)
    if figure is None:
        return None
    row, profiles = best.row, best.profiles
    figure.suptitle(
        f"{row.model} by {row.method}, {bits_name(row.w_bits, row.a_bits)}, seed {row.seed}, on test images: "
        f"top-1 {row.lq_top1:.2f} -> {_by_cat(best)[0]:.2f} % (FP {row.fp_top1:.2f} %), the largest gain of this run",
        fontsize="medium",
    )
    (part,) = figure.subfigures(1, 1, squeeze=False)[0]
    draw_clusters(part, profiles[:CLUSTERS_DRAWN], len(profiles), classes, "test images")
    return figure


def _by_cat(measurement: Measurement) -> tuple[float, float]:
    """Top-1 and gain of the correction that the profiles are of."""
    row = measurement.row
    mode = OUTPUT_MODE if row.layers_top1 is None else DEFAULT_MODE
    return getattr(row, f"{mode}_top1"), getattr(row, f"{mode}_delta")


def class_gains(measured: Sequence[Measurement]) -> Iterator[tuple[str, Tensor]]:
    """Name of every method and bit setting, and `(C,)` what it gains a class, see `draw_changes`."""
    mode = modes_in(measured)[-1]
    names = LABELS, *NETWORKS  # not the ranks of labels, which are stored beside them
    found = (each.predictions[name] for each in measured for name in names if name in each.predictions)
    classes = max(int(tensor.max()) for tensor in found) + 1
    for group in over_seeds([each for each in measured if mode in each.predictions]):
        yield group[0].row.title, torch.stack([_class_gain(each, mode, classes) for each in group]).mean(dim=0)


def _class_gain(measurement: Measurement, mode: str, classes: int) -> Tensor:
    labels = measurement.predictions["labels"].long()
    gains = change(measurement.predictions, mode)
    sums = torch.zeros(classes, dtype=torch.float64).index_add_(0, labels, gains)
    return 100 * sums / torch.bincount(labels, minlength=classes).clamp(min=1)


def _extremes(gains: Tensor) -> list[int]:
    """Classes to draw: all, or those that gain least and most on average."""
    if gains.shape[1] <= CLASSES_DRAWN:
        return list(range(gains.shape[1]))
    order, half = gains.mean(dim=0).argsort().tolist(), CLASSES_DRAWN // 2
    return order[:half] + order[-half:]
