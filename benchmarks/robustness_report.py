"""Gains of all draws as CSV, as Markdown tables over sizes and over sources, and as a figure."""

import logging
import statistics
from collections.abc import Iterable, Sequence
from itertools import product
from pathlib import Path

from baselines.files import atomic_path
from benchmarks.draws import MODES, Gain, Source
from benchmarks.files import write_text
from benchmarks.report import align, to_csv

logger = logging.getLogger(__name__)

LABELS = {"plain_affine": "plain affine", "cat_paper": "CAT (paper)", "cat": "CAT"}
FIGURE = "robustness.png"
# Colours of Okabe and Ito, which people with any colour vision tell apart; markers tell them apart without colour.
STYLES = {"plain_affine": ("#0072B2", "o"), "cat_paper": ("#D55E00", "s"), "cat": ("#009E73", "^")}
SPREAD = 0.3  # of the distance to the next size, that dots of different sources keep from its middle
LINEAR_TO = 1.0  # points, up to which the axis of gains is linear; logarithmic beyond, since some losses are huge
TICKS = 0.0, *(sign * tick for tick in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0) for sign in (-1, 1))


def write_report(folder: Path, gains: Sequence[Gain], notes: Sequence[str]) -> list[str]:
    """Write ``results.csv``, ``results.md`` and, where matplotlib is installed, ``robustness.png``; what was written.

    Each is written whole or not at all.
    """
    write_text(folder / "results.csv", to_csv(gains))
    write_text(folder / "results.md", to_markdown(gains, notes) + "\n")
    return ["results.csv", "results.md", *([FIGURE] if plot(gains, folder / FIGURE) else [])]


def to_markdown(gains: Sequence[Gain], notes: Sequence[str]) -> str:
    """Both tables with what they show, and ``notes`` on what is not in them."""
    sources = len({gain.source for gain in gains})
    title = (
        f"Gain in top-1 over the low-bit model, in percentage points, on {sources} "
        f"{'source' if sources == 1 else 'sources'}: every draw is a fit on other unlabelled images, scored on test "
        "images; *worst draw* is the smallest gain, *draws that lose* have a gain below zero."
    )
    return "\n\n".join([title, sizes_table(gains), "Mean gain of each source:", sources_table(gains), *notes])


def sizes_table(gains: Sequence[Gain]) -> str:
    """One line a number of images and mode, over the draws of all sources."""
    lines = [("images", "correction", "mean gain", "worst draw", "draws that lose", "draws")]
    for images, mode in product(_sizes(gains), MODES):
        values = [gain.gain for gain in gains if (gain.images, gain.mode) == (images, mode)]
        if values:
            losing = sum(value < 0 for value in values) / len(values)
            figures = f"{statistics.fmean(values):+.2f}", f"{min(values):+.2f}", f"{losing:.0%}", str(len(values))
            lines.append((f"{images:,}", LABELS[mode], *figures))
    return align(lines)


def sources_table(gains: Sequence[Gain]) -> str:
    """One line a source and number of images, with the mean gain of every mode over the draws."""
    lines = [("source", "images", "draws", "FP", "low-bit", *LABELS.values())]
    for source, images in product(dict.fromkeys(gain.source for gain in gains), _sizes(gains)):
        found = [gain for gain in gains if (gain.source, gain.images) == (source, images)]
        if found:
            first, draws = found[0], len({gain.draw for gain in found})
            means = [_mean(gain.gain for gain in found if gain.mode == mode) for mode in LABELS]
            lines.append(
                (source, f"{images:,}", str(draws), f"{first.fp_top1:.2f}", f"{first.lq_top1:.2f}", *means),
            )
    return align(lines)


def shortfalls(sources: Sequence[Source], images: Sequence[int], max_draws: int) -> list[str]:
    """A sentence for every number of fresh images that is too small for ``max_draws`` draws of each size."""
    notes = []
    for fresh in sorted({source.fresh for source in sources}):
        alike = [source for source in sources if source.fresh == fresh]
        draws = {number: alike[0].draws(number, max_draws) for number in images}
        if min(draws.values()) < max_draws:
            counts = ", ".join(f"{count} of {number:,}" for number, count in draws.items())
            where = alike[0].name if len(alike) == 1 else f"{alike[0].name} and {len(alike) - 1} more"
            notes.append(f"Fewer than {max_draws} draws of a size in {where}: {fresh:,} fresh images are {counts}.")
    return notes


def plot(gains: Sequence[Gain], path: Path) -> bool:
    """Draw every gain as a dot against the number of images, one panel a mode; False without matplotlib."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FixedLocator
    except ImportError:
        logger.warning("%s needs matplotlib, which is not installed: pip install 'cat-plugin[plots]'", path.name)
        return False
    modes = [mode for mode in MODES if any(gain.mode == mode for gain in gains)]
    sources, sizes = list(dict.fromkeys(gain.source for gain in gains)), _sizes(gains)
    figure = Figure(figsize=(1.5 + 3.5 * len(modes), 4), layout="constrained")
    panels = figure.subplots(1, len(modes), sharex=True, sharey=True, squeeze=False)[0]
    for panel, mode in zip(panels, modes, strict=True):
        colour, marker = STYLES[mode]
        shown = [gain for gain in gains if gain.mode == mode]
        places = [sizes.index(gain.images) + _offset(sources.index(gain.source), len(sources)) for gain in shown]
        panel.axhline(0, color="grey", linewidth=0.8)
        panel.scatter(places, [gain.gain for gain in shown], s=14, color=colour, marker=marker, alpha=0.6, linewidths=0)
        for place, images in enumerate(sizes):
            values = [gain.gain for gain in shown if gain.images == images]
            if values:
                panel.hlines(statistics.fmean(values), place - 0.4, place + 0.4, color="black", linewidth=1.5)
        panel.set(title=LABELS[mode], xlabel="images", xticks=range(len(sizes)), xticklabels=[f"{n:,}" for n in sizes])
        panel.set_yscale("symlog", linthresh=LINEAR_TO, linscale=2)
        panel.yaxis.set_major_locator(FixedLocator(TICKS))
        panel.yaxis.set_major_formatter(lambda gain, _: f"{gain:+g}" if gain else "0")
        panel.grid(axis="y", linewidth=0.3)
    panels[0].set_ylabel("gain in top-1, percentage points")
    figure.suptitle("Every dot is a draw, every bar the mean of a size", fontsize="medium")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150)
    return True


def _sizes(gains: Sequence[Gain]) -> list[int]:
    return sorted({gain.images for gain in gains})


def _mean(values: Iterable[float]) -> str:
    known = list(values)
    return f"{statistics.fmean(known):+.2f}" if known else "-"


def _offset(index: int, sources: int) -> float:
    """Sources side by side around the middle."""
    return 0.0 if sources == 1 else SPREAD * (2 * index / (sources - 1) - 1)
