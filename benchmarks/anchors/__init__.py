"""Gains that the authors of CAT published, to be shown beside ours.

``cat_alpha.csv``, ``cat_clusters.csv`` and ``cat_samples.csv`` are the authors' logs of arXiv 2509.26277, tabulated:
top-1 in percent on the 50,000 validation images of ImageNet, networks quantized by PD-Quant, with and without CAT.
Curves over alpha and over clusters were fitted on all 1.28 million training images.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

SOURCE = "the authors' published logs of CAT on ImageNet, networks quantized by PD-Quant (arXiv 2509.26277)"
# By factor: the file, its column of values, and what was held fixed.
CURVES = {
    "alpha": ("cat_alpha.csv", "alpha", "K = 64, all training images"),
    "clusters": ("cat_clusters.csv", "num_clusters", "alpha = 0.6, all training images"),
    "images": ("cat_samples.csv", "cat_fit_images", "K = 64, alpha = 0.5"),
}


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One published figure: ``gain`` in top-1 over the low-bit network, in percentage points, at a factor's value."""

    arch: str
    w_bits: int
    a_bits: int
    seed: int
    value: float
    gain: float


def load_anchors(factor: str) -> list[Anchor]:
    """What was published on a factor; nothing where it is not among :data:`CURVES`."""
    if factor not in CURVES:
        return []
    name, column, _ = CURVES[factor]
    with (Path(__file__).parent / name).open(encoding="utf-8", newline="") as opened:
        return [
            Anchor(
                arch=line["arch"],
                w_bits=int(line["w_bits"]),
                a_bits=int(line["a_bits"]),
                seed=int(line["seed"]),
                value=float(line[column]),
                gain=float(line.get("top1") or line["cat_top1"]) - float(line["baseline_top1"]),
            )
            for line in csv.DictReader(opened)
        ]
