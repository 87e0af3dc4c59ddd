"""Gains of all draws as CSV, as Markdown tables over sizes and over sources, and as a figure."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path

from benchmarks.measure.corrections import LOGITS_MODES
from benchmarks.measure.draws import Gain
from benchmarks.measure.paired_logits import Source
from benchmarks.reports.plots import GAIN_LABEL, STYLES, gain_axis, new_figure
from benchmarks.reports.tables import markdown_table, to_csv, write_texts
from benchmarks.wording import signed
from cat_plugin.report.figures import plain_style, save_figure

FIGURE = "robustness.png"
SPREAD = 0.3  # of the distance to the next size, that dots of different sources keep from its middle


def write_report(folder: Path, gains: Sequence[Gain], notes: Sequence[str]) -> dict[str, bool]:
    """Write `results.csv`, `results.md` and, where matplotlib is installed, `robustness.png`.

    Each is written whole or not at all. Gives the files there are, and whether each was there just the same.
    """
    written = write_texts(folder, {"results.csv": to_csv(gains), "results.md": to_markdown(gains, notes) + "\n"})
    return written | ({FIGURE: False} if plot(gains, folder / FIGURE) else {})


def to_markdown(gains: Sequence[Gain], notes: Sequence[str]) -> str:
    """Both tables with what they show, and `notes` on what is not in them."""
    sources = len({gain.source for gain in gains})
    title = (
        f"Gain in top-1 over the low-bit model, in percentage points, on {sources} "
        f"{'source' if sources == 1 else 'sources'}: every draw is a fit on other unlabelled images, scored on test "
        "images; *worst draw* is the smallest gain, *draws that lose* have a gain below zero."
    )
    return "\n\n".join([title, sizes_table(gains), "Mean gain of each source:", sources_table(gains), *notes])


def sizes_table(gains: Sequence[Gain]) -> str:
    """One line a number of images and mode, over the draws of all sources."""
    groups = {
        (f"{images:,}", LOGITS_MODES[mode]): [gain.gain for gain in gains if (gain.images, gain.mode) == (images, mode)]
        for images, mode in product(_sizes(gains), LOGITS_MODES)
    }
    return gains_table("images", groups)


def gains_table(header: str, groups: Mapping[tuple[str, str], Sequence[float]]) -> str:
    """Mean, worst and share of losses of the gains of every value of what `header` names, and correction."""
    lines = [(header, "correction", "mean gain", "worst draw", "draws that lose", "draws")]
    for names, values in groups.items():
        if values:
            losing = sum(value < 0 for value in values) / len(values)
            figures = signed(statistics.fmean(values)), signed(min(values)), f"{losing:.0%}", str(len(values))
            lines.append((*names, *figures))
    return markdown_table(lines)


def sources_table(gains: Sequence[Gain]) -> str:
    """One line a source and number of images, with the mean gain of every mode over the draws."""
    lines = [("source", "images", "draws", "FP", "low-bit", *LOGITS_MODES.values())]
    for source, images in product(dict.fromkeys(gain.source for gain in gains), _sizes(gains)):
        found = [gain for gain in gains if (gain.source, gain.images) == (source, images)]
        if found:
            first, draws = found[0], len({gain.draw for gain in found})
            means = [mean_gain(gain.gain for gain in found if gain.mode == mode) for mode in LOGITS_MODES]
            lines.append(
                (source, f"{images:,}", str(draws), f"{first.fp_top1:.2f}", f"{first.lq_top1:.2f}", *means),
            )
    return markdown_table(lines)


def shortfalls(sources: Sequence[Source], images: Sequence[int], max_draws: int) -> list[str]:
    """A sentence for every number of fresh images that is too small for `max_draws` draws of each size."""
    notes = []
    for fresh in sorted({source.fresh for source in sources}):
        alike = [source for source in sources if source.fresh == fresh]
        draws = {number: alike[0].draws(number, max_draws) for number in images}
        if min(draws.values()) < max_draws:
            counts = ", ".join(f"{count} of {number:,}" for number, count in draws.items())
            where = alike[0].name if len(alike) == 1 else f"{alike[0].name} and {len(alike) - 1} more"
            notes.append(f"Fewer than {max_draws} draws of a size in {where}: {fresh:,} fresh images are {counts}.")
    return notes


@plain_style()
def plot(gains: Sequence[Gain], path: Path) -> bool:
    """Draw every gain as a dot against the number of images, one panel a mode; False without matplotlib."""
    modes = [mode for mode in LOGITS_MODES if any(gain.mode == mode for gain in gains)]
    sources, sizes = list(dict.fromkeys(gain.source for gain in gains)), _sizes(gains)
    drawing = new_figure(path.name, len(modes))
    if drawing is None:
        return False
    figure, panels = drawing
    for panel, mode in zip(panels, modes, strict=True):
        colour, marker = STYLES[mode]
        shown = [gain for gain in gains if gain.mode == mode]
        places = [sizes.index(gain.images) + _offset(sources.index(gain.source), len(sources)) for gain in shown]
        panel.scatter(places, [gain.gain for gain in shown], s=14, color=colour, marker=marker, alpha=0.6, linewidths=0)
        for place, images in enumerate(sizes):
            values = [gain.gain for gain in shown if gain.images == images]
            if values:
                panel.hlines(statistics.fmean(values), place - 0.4, place + 0.4, color="black", linewidth=1.5)
        panel.set(
            title=LOGITS_MODES[mode], xlabel="images", xticks=range(len(sizes)), xticklabels=[f"{n:,}" for n in sizes]
        )
        gain_axis(panel)
    panels[0].set_ylabel(GAIN_LABEL)
    figure.suptitle("Every dot is a draw, every bar the mean of a size", fontsize="medium")
    save_figure(figure, path)
    return True


def _sizes(gains: Sequence[Gain]) -> list[int]:
    return sorted({gain.images for gain in gains})


def mean_gain(values: Iterable[float]) -> str:
    """With its sign, "-" where there are none."""
    known = list(values)
    return signed(statistics.fmean(known)) if known else "-"


def _offset(index: int, sources: int) -> float:
    """Sources side by side around the middle."""
    return 0.0 if sources == 1 else SPREAD * (2 * index / (sources - 1) - 1)
