"""What the literature says about the networks of a run on ImageNet, as lines of a table beside our own."""

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.anchors import SOURCES, Published, load_published
from benchmarks.datasets.imagenet import IMAGENET, VAL_IMAGES
from benchmarks.measure.accuracy import Measurement
from benchmarks.measure.comparisons import Summary, by_setting
from benchmarks.wording import signed

# torchvision's and timm's names, and the papers'.
NETWORKS = {
    "resnet18": "resnet18",
    "resnet50": "resnet50",
    "mobilenet_v2": "mobilenetv2",
    "regnetx_006": "regnetx_600m",
    "regnet_x_3_2gf": "regnetx_3200m",
}
# Networks that resemble one of the papers'.
OTHERS = {
    "mnasnet1_0": "The papers' MNasNet is of twice the width (x2.0); torchvision and timm have none wider than x1.4.",
    "regnet_x_400mf": "The papers' smaller RegNetX has 600 MF: regnetx_006, of timm.",
}
HEADER = (
    "quantized by",
    "figures of",
    "FP",
    "low-bit",
    "difference",
    "gain of paper",
    "gain of output",
    "gain of layers",
)
OURS = "this run"
CAVEAT = (
    "Published networks start from other full-precision weights than torchvision's (PD-Quant's from those that BRECQ's "
    "authors released) and were made in 20,000 iterations a unit on 1,024 images: compare differences and gains, not "
    "top-1."
)


@dataclass(frozen=True, kw_only=True)
class Beside:
    """A table, its header first, or nothing where nothing is published; and the notes below it."""

    lines: list[tuple[str, ...]]
    notes: str


def beside(measured: Sequence[Measurement]) -> Beside | None:
    """Our figures over seeds, and below each what is published; None where the papers do not speak of these.

    They speak of some networks, on all 50,000 validation images: a smaller folder is another task.

    All of `measured` are of one data set and network.
    """
    row = measured[0].row
    if row.dataset != IMAGENET.name or row.n_eval != VAL_IMAGES or row.model not in NETWORKS | OTHERS:
        return None
    lines = _lines(measured, load_published(NETWORKS[row.model])) if row.model in NETWORKS else []
    if not lines:
        why = OTHERS.get(row.model, "The papers have other methods or bit settings.")
        return Beside(lines=[], notes=f"No published figures for these. {why}")
    used = [f"- {source}: {text}" for source, text in SOURCES.items() if source in {line[1] for line in lines}]
    return Beside(lines=[HEADER, *lines], notes="\n".join([f"{CAVEAT}\n", *used]))


def _lines(measured: Sequence[Measurement], known: Sequence[Published]) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = []
    for found in by_setting(measured):
        first = next(iter(found.values()))
        theirs = [each for each in known if (each.method, each.w_bits, each.a_bits) == first.setting]
        if not theirs:
            continue
        gains = [_gain(found.get(mode)) for mode in ("cat_paper", "output", "layers")]
        lines.append((first.title, OURS, *_scores(first.fp_top1, first.lq_top1), *gains))
        for each in theirs:
            scores = _scores(each.fp_top1, each.top1)
            lines.append((first.title, each.source, *scores, _points(each.cat_gain), "-", "-"))
    return lines


def _scores(fp_top1: float | None, top1: float) -> tuple[str, str, str]:
    """Both, and what quantization loses."""
    if fp_top1 is None:
        return "-", f"{top1:.2f}", "-"
    return f"{fp_top1:.2f}", f"{top1:.2f}", _points(top1 - fp_top1)


def _gain(line: Summary | None) -> str:
    return "-" if line is None else _points(line.delta)


def _points(value: float | None) -> str:
    return "-" if value is None else signed(value)
