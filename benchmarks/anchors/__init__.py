"""Figures that others published, to be shown beside ours.

`cat_alpha.csv`, `cat_clusters.csv` and `cat_samples.csv` are the authors' logs of arXiv 2509.26277, tabulated:
top-1 in percent on the 50,000 validation images of ImageNet, networks quantized by PD-Quant, with and without CAT.
Curves over alpha and over clusters were fitted on all 1.28 million training images.

`imagenet_ptq.csv` holds what quantized networks are published to reach on the same images; its column `source` is a
key of `SOURCES`.
"""

import csv
import statistics
from dataclasses import dataclass
from pathlib import Path

SOURCE = "the authors' published logs of CAT on ImageNet, networks quantized by PD-Quant (arXiv 2509.26277)"
# By factor: the file, its column of values, and what was held fixed.
CURVES = {
    "alpha": ("cat_alpha.csv", "alpha", "K = 64, all training images"),
    "clusters": ("cat_clusters.csv", "num_clusters", "alpha = 0.6, all training images"),
    "images": ("cat_samples.csv", "cat_fit_images", "K = 64, alpha = 0.5"),
}


CAT_AUTHORS = "CAT authors"
PAPER_ALPHA = 0.4
SOURCES = {
    "PD-Quant authors": "hustvl/PD-Quant, README.md, commit 189265db (arXiv 2212.07048)",
    "QDrop authors": "wimh966/QDrop, README.md, commit ef37616c (arXiv 2203.05740)",
    "MQBench": "ModelTC/MQBench, docs/source/benchmark/ImageClassification/Benchmark.rst, commit 44de6618; there "
    "AdaRound and BRECQ learn rounding with quantized activations, and AdaRound has 10,000 iterations",
    CAT_AUTHORS: f"{SOURCE}; mean over seeds, K = 64, alpha = {PAPER_ALPHA:g}, CAT fitted on all 1.28 million training "
    "images",
}


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """One published figure: `gain` in top-1 over the low-bit network, in percentage points, at a factor's value."""

    arch: str
    w_bits: int
    a_bits: int
    seed: int
    value: float
    gain: float


def load_anchors(factor: str) -> list[Anchor]:
    """What was published on a factor; nothing where it is not among `CURVES`."""
    if factor not in CURVES:
        return []
    name, column, _ = CURVES[factor]
    return [
        Anchor(
            arch=line["arch"],
            w_bits=int(line["w_bits"]),
            a_bits=int(line["a_bits"]),
            seed=int(line["seed"]),
            value=float(line[column]),
            gain=float(line.get("top1") or line["cat_top1"]) - float(line["baseline_top1"]),
        )
        for line in _read(name)
    ]


@dataclass(frozen=True, kw_only=True)
class Published:
    """Top-1 in percent of a quantized network on ImageNet's validation images, as `source` says.

    `fp_top1` is that of its full-precision original and `cat_gain` what CAT adds, in points; None: not stated.
    """

    network: str
    method: str
    w_bits: int
    a_bits: int
    top1: float
    source: str
    fp_top1: float | None = None
    cat_gain: float | None = None


def load_published(network: str) -> list[Published]:
    """All that is published of a network, by the papers' name for it; nothing where it is not in their tables."""
    found = [
        Published(
            network=network,
            method=line["method"],
            w_bits=int(line["w_bits"]),
            a_bits=int(line["a_bits"]),
            top1=float(line["top1"]),
            source=line["source"],
            fp_top1=float(line["fp_top1"]),
        )
        for line in _read("imagenet_ptq.csv")
        if line["network"] == network
    ]
    return found + _logs_of_cat(network)


def _logs_of_cat(network: str) -> list[Published]:
    """Means over the seeds in `cat_alpha.csv`."""
    seeds: dict[tuple[int, int], list[dict[str, str]]] = {}
    for line in _read(CURVES["alpha"][0]):
        if line["arch"] == network and float(line["alpha"]) == PAPER_ALPHA:
            seeds.setdefault((int(line["w_bits"]), int(line["a_bits"])), []).append(line)
    return [
        Published(
            network=network,
            method="pd_quant",
            w_bits=w_bits,
            a_bits=a_bits,
            top1=statistics.fmean(float(line["baseline_top1"]) for line in group),
            source=CAT_AUTHORS,
            cat_gain=statistics.fmean(float(line["top1"]) - float(line["baseline_top1"]) for line in group),
        )
        for (w_bits, a_bits), group in seeds.items()
    ]


def _read(name: str) -> list[dict[str, str]]:
    with (Path(__file__).parent / name).open(encoding="utf-8", newline="") as opened:
        return list(csv.DictReader(opened))
