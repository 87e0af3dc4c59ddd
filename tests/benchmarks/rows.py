"""Measurements that cost nothing."""

from collections.abc import Sequence

import torch

from benchmarks.evaluate import Measurement, Row, Setting

BASE = {
    **{"dataset": "digits", "model": "resnet8", "iters": 9, "n_calib": 16, "n_cat": 1024, "n_eval": 500},
    **{"fp_top1": 99.0, "lq_top1": 90.0, "plain_affine_top1": 91.0, "cat_paper_top1": 92.5, "cat_top1": 93.0},
    "cat_delta": 3.0,
}


def make_row(setting: Setting | None = None, **values) -> Row:
    setting = setting or Setting("rtn", 2, 2, 0)
    return Row(**{**BASE, **vars(setting), **values})


def make_measurement(setting: Setting | None = None, won: int = 20, lost: int = 5, **values) -> Measurement:
    """All 500 labels are 0; CAT wins the first ``won`` images and loses the next ``lost``."""
    lq = torch.zeros(500, dtype=torch.int16)
    lq[:won] = 1
    cat = torch.zeros(500, dtype=torch.int16)
    cat[won : won + lost] = 1
    return Measurement(make_row(setting, **values), {"labels": torch.zeros_like(lq), "lq": lq, "cat": cat})


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
