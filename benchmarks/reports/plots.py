"""What all figures share: colours and marks of corrections, and axes of gains."""

import logging
from typing import TYPE_CHECKING

from cat_plugin import CATError
from cat_plugin.report import figures as plotting

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

# Colours of Okabe and Ito, which people with any colour vision tell apart; markers tell them apart without colour.
STYLES = {
    "plain_affine": ("#0072B2", "o"),
    "cat_paper": ("#D55E00", "s"),
    "output": ("#009E73", "^"),
    "layers": ("#CC79A7", "D"),
}
COLOURS = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
MARKERS = "o", "s", "^", "D", "v", "P", "X"
LINEAR_TO = 1.0  # points, up to which the axis of gains is linear; logarithmic beyond, since some losses are huge
GAIN_LABEL = f"gain in top-1, percentage points\n(logarithmic beyond ±{LINEAR_TO:g})"
TICKS = 0.0, *(sign * tick for tick in (0.3, 1.0, 3.0, 10.0, 30.0, 100.0) for sign in (-1, 1))


def blank_figure(name: str, width: float, height: float) -> "Figure | None":
    """A figure of so many inches; None, and a warning that `name` is not drawn, where matplotlib is missing."""
    try:
        return plotting.new_figure(width, height)
    except CATError:
        logger.warning("%s needs matplotlib, which is not installed: pip install matplotlib", name)
        return None


def new_figure(name: str, panels: int, panel_width: float = 3.5) -> "tuple[Figure, list[Axes]] | None":
    """A figure with panels side by side that share their axes; None, and a warning, where matplotlib is missing."""
    figure = blank_figure(name, 1.5 + panel_width * panels, 4)
    if figure is None:
        return None
    return figure, list(figure.subplots(1, panels, sharex=True, sharey=True, squeeze=False)[0])


def gain_axis(panel: "Axes") -> None:
    """Gains in percentage points, upwards, with a line at zero; huge losses are drawn near."""
    from matplotlib.ticker import FixedLocator

    panel.axhline(0, color="grey", linewidth=0.8)
    panel.set_yscale("symlog", linthresh=LINEAR_TO, linscale=2)
    panel.yaxis.set_major_locator(FixedLocator(TICKS))
    panel.yaxis.set_major_formatter(lambda gain, _: f"{gain:+g}" if gain else "0")
    panel.grid(axis="y", linewidth=0.3)
