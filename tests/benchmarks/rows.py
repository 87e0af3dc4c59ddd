"""Rows that cost nothing."""

from benchmarks.evaluate import Row, Setting

BASE = {
    **{"dataset": "digits", "model": "resnet8", "iters": 9, "n_calib": 16, "n_cat": 1024, "n_eval": 500},
    **{"fp_top1": 99.0, "lq_top1": 90.0, "plain_affine_top1": 91.0, "cat_paper_top1": 92.5, "cat_top1": 93.0},
    "cat_delta": 3.0,
}


def make_row(setting: Setting | None = None, **values) -> Row:
    setting = setting or Setting("rtn", 2, 2, 0)
    return Row(**{**BASE, **vars(setting), **values})
