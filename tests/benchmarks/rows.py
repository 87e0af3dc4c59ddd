"""Measurements that cost nothing, and the cells of tables."""

from collections.abc import Sequence

import torch

from benchmarks.measure.accuracy import Measurement, Row
from benchmarks.measure.paired_logits import rank_name
from benchmarks.measure.protocol import Setting

IMAGES = 500
BASE = {"dataset": "digits", "model": "resnet8", "iters": 9, "n_calib": 16, "n_cat": 1024}


def make_measurement(setting: Setting | None = None, won: int = 20, lost: int = 5, **figures) -> Measurement:
    """All 500 labels are 0. FP misses the last 5 images and the low-bit network the first 50, of which the default wins
    the first `won`; it loses as many as `lost` of those that follow. Plain affine wins 5, the paper's CAT 25 and
    loses 12, the output alone 15 and 5. `cat_paper=False` is a run without the paper's, and `layers=False` one without
    the default; `parts` are seconds, `ranks` those of the labels, by network, and other `figures` replace those of the
    row.
    """
    without = [mode for mode in ("cat_paper", "layers") if not figures.pop(mode, True)]
    parts, ranks = figures.pop("parts", {}), figures.pop("ranks", {})
    predictions = {
        "labels": torch.zeros(IMAGES, dtype=torch.int16),
        "fp": wrong(range(IMAGES - 5, IMAGES)),
        "lq": wrong(range(50)),
        "plain_affine": wrong(range(5, 50)),
        "cat_paper": wrong(range(25, 50 + 12)),
        "output": wrong(range(15, 50 + 5)),
        "layers": wrong(range(won, 50 + lost)),
    }
    predictions |= {rank_name(name): torch.tensor(each, dtype=torch.int16) for name, each in ranks.items()}
    for mode in without:
        del predictions[mode]
    computed = Measurement.figures(predictions)
    row = Row(**{**BASE, **vars(setting or Setting("rtn", 2, 2, 0)), **computed, **figures})
    return Measurement(row, predictions, parts=parts)


def wrong(places: range) -> torch.Tensor:
    """Predictions that are wrong there."""
    predicted = torch.zeros(IMAGES, dtype=torch.int16)
    predicted[list(places)] = 1
    return predicted


def all_same(found: Sequence[Measurement], expected: Sequence[Measurement]) -> bool:
    """Whether there are as many, and each is `same` as its counterpart."""
    return len(found) == len(expected) and all(map(same, found, expected))


def same(one: Measurement, other: Measurement) -> bool:
    """Whether rows and predictions are equal."""
    keys = one.predictions.keys()
    tensors = keys == other.predictions.keys() and all(
        torch.equal(one.predictions[k], other.predictions[k]) for k in keys
    )
    return one.row == other.row and tensors


def cells(table: str) -> list[list[str]]:
    """The texts of a Markdown table, its rule included."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
