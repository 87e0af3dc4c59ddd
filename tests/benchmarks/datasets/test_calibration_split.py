import pytest
import torch

from benchmarks import BenchmarkError
from benchmarks.datasets.calibration_split import split_calibration


def test_split_is_disjoint_and_seeded():
    before = torch.get_rng_state()
    calib, cat = split_calibration(100, 30, 60, seed=0)
    assert (len(calib), len(cat)) == (30, 60)
    assert len({*calib.tolist(), *cat.tolist()}) == 90
    assert max(*calib.tolist(), *cat.tolist()) < 100
    again, other = split_calibration(100, 30, 60, seed=0)[0], split_calibration(100, 30, 60, seed=1)[0]
    assert torch.equal(calib, again)
    assert not torch.equal(calib, other)
    assert torch.equal(before, torch.get_rng_state())


def test_split_may_use_every_image():
    calib, cat = split_calibration(10, 4, 6, seed=5)
    assert sorted([*calib.tolist(), *cat.tolist()]) == list(range(10))


@pytest.mark.parametrize(
    ("n_calib", "n_cat", "message"),
    [(5, 6, "n_calib=5 plus n_cat=6 needs 11 training images, there are 10"), (0, 6, "at least 1"), (5, 0, "n_cat=0")],
)
def test_impossible_splits_are_refused(n_calib, n_cat, message):
    with pytest.raises(BenchmarkError, match=message):
        split_calibration(10, n_calib, n_cat, seed=0)
