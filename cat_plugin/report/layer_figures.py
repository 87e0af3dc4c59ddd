"""What became of the layers, drawn: the held-out divergence over epochs, and how much is corrected where."""

from typing import TYPE_CHECKING

from cat_plugin.layers.evidence import LayersEvidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALL = "small"
SCALE, SHIFT = ("#0072B2", "o"), ("#D55E00", "x")


def draw_curve(panel: "Axes", layers: LayersEvidence) -> None:
    """The held-out divergence before the fit and after each epoch."""
    panel.plot(range(len(layers.curve)), layers.curve, color="#009E73", marker=".")
    outcome = "used" if layers.accepted else "not used"
    panel.set_title(f"layers: held-out divergence from FP ({outcome})", fontsize=SMALL)
    panel.set_xlabel("epochs", fontsize=SMALL)
    panel.locator_params(axis="x", integer=True)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", linewidth=0.3)


def draw_sizes(panel: "Axes", layers: LayersEvidence) -> None:
    """The mean size of scales and offsets of each layer, in the order of the network."""
    places = range(len(layers.layers))
    for field, label, (colour, marker) in (
        ("scale", "|scale - 1|", SCALE),
        ("shift", "|offset| / spread of its channel", SHIFT),
    ):
        sizes = [getattr(layer, field) for layer in layers.layers]
        panel.plot(places, sizes, marker, color=colour, markersize=4, label=label)
    outcome = "" if layers.accepted else ", not used"
    panel.set_title(f"size of the correction along the network (mean over channels{outcome})", fontsize=SMALL)
    panel.locator_params(axis="x", integer=True)
    panel.set_xlabel("layer", fontsize=SMALL)
    panel.set_ylim(bottom=0)
    panel.grid(axis="y", linewidth=0.3)
    panel.legend(fontsize="x-small", frameon=False)
