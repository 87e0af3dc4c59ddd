"""What all figures share: colours, names and marks of corrections, axes of gains, and how they are written."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from baselines.files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Colours of Okabe and Ito, which people with any colour vision tell apart; markers tell them apart without colour.
STYLES = {"plain_affine": ("#0072B2", "o"), "cat_paper": ("#D55E00", "s"), "cat": ("#009E73", "^")}
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "o", "s", "^", "D", "v", "P", "X"
BACKGROUND = "white"  # of its own, so that a figure reads the same on a light and on a dark page
LINEAR_TO = 1.0  # points, up to which the axis of gains is linear; logarithmic beyond, since some losses are huge
TICKS = 0.0, *(sign * tick for tick in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0) for sign in (-1, 1))


def new_figure(name: str, panels: int) -> "tuple[Figure, list[Axes]] | None":
    """A figure with panels side by side that share their axes; None, and a warning, where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("%s needs matplotlib, which is not installed: pip install 'cat-plugin[plots]'", name)
        return None
    figure = Figure(figsize=(1.5 + 3.5 * panels, 4), layout="constrained", facecolor=BACKGROUND)
    return figure, list(figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0])


def gain_axis(panel: "Axes") -> None:
    """Gains in percentage points, upwards, with a line at zero; huge losses are drawn near."""
    from matplotlib.ticker import FixedLocator

    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_yscale("symlog", linthresh=LINEAR_TO, linscale=2)
    panel.yaxis.set_major_locator(FixedLocator(TICKS))
    panel.yaxis.set_major_formatter(lambda gain, _: f"{gain:+g}" if gain else "0")
    panel.grid(axis="y", linewidth=0.3)


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=150, facecolor=BACKGROUND)
