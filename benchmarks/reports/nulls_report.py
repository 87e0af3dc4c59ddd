"""How often the default was accepted where nothing can be gained, as CSV and as a Markdown table."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure.nulls import FRESH_IMAGES, NullFit
from benchmarks.reports.tables import markdown_table, to_csv, write_texts
from benchmarks.wording import signed

TITLE = (
    "Fits of the default where nothing can be gained, each on logits or networks drawn anew: *accepted* are those that "
    "were not left alone, *of layers* those among them whose layers are corrected; *worst* and *mean change* are those "
    f"in agreement with FP, in percentage points, on {FRESH_IMAGES:,} fresh images."
)


def write_report(folder: Path, fits: Sequence[NullFit]) -> dict[str, bool]:
    """Write `results.csv` and `results.md`, each whole or not at all.

    Gives the files there are, and whether each was there just the same.
    """
    return write_texts(folder, {"results.csv": to_csv(fits), "results.md": to_markdown(fits) + "\n"})


def to_markdown(fits: Sequence[NullFit]) -> str:
    """The table with what it shows."""
    return f"{TITLE}\n\n{nulls_table(fits)}"


def nulls_table(fits: Sequence[NullFit]) -> str:
    """One line a case and number of images; "-" where nothing was accepted."""
    lines = [("case", "images", "draws", "accepted", "of layers", "worst change", "mean change")]
    for case, images in dict.fromkeys((fit.case, fit.images) for fit in fits):
        drawn = [fit for fit in fits if (fit.case, fit.images) == (case, images)]
        changes = [fit.change for fit in drawn if fit.accepted]
        figures = [signed(min(changes)), signed(statistics.fmean(changes))] if changes else ["-", "-"]
        of_layers = str(sum(fit.layers for fit in drawn))
        lines.append((case, f"{images:,}", str(len(drawn)), str(len(changes)), of_layers, *figures))
    return markdown_table(lines, text_columns=1)
