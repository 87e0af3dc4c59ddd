"""Published figures, against those in their README and by hand."""

import csv
from pathlib import Path

import pytest

import benchmarks.anchors
from benchmarks.anchors import CURVES, load_anchors

FOLDER = Path(benchmarks.anchors.__file__).parent


def test_gain_is_against_the_baseline_of_the_same_network():
    alpha = {(a.arch, a.w_bits, a.a_bits, a.seed, a.value): a.gain for a in load_anchors("alpha")}
    assert len(alpha) == 400
    assert alpha["resnet18", 2, 2, 1000, 0.4] == pytest.approx(53.27 - 52.892)
    images = {(a.w_bits, a.seed, a.value): a.gain for a in load_anchors("images")}
    assert images[2, 1001, 640] == pytest.approx(46.294 - 52.842)
    clusters = {(a.arch, a.w_bits, a.seed, a.value): a.gain for a in load_anchors("clusters")}
    assert clusters["resnet18", 2, 1000, 1] == pytest.approx(0.324)


@pytest.mark.parametrize("factor", ["alpha", "clusters"])
def test_gains_are_those_that_the_files_state(factor):
    with (FOLDER / CURVES[factor][0]).open() as opened:
        stated = [float(line["gain"]) for line in csv.DictReader(opened)]
    assert [anchor.gain for anchor in load_anchors(factor)] == pytest.approx(stated, abs=1e-6)


def test_mean_gain_at_the_papers_alpha():
    """The means over networks and seeds that the design notes of this project state."""
    at = [anchor for anchor in load_anchors("alpha") if anchor.value == 0.4]
    for (w_bits, a_bits), expected in {(2, 2): 0.84, (2, 4): 0.30, (4, 2): 0.32, (4, 4): 0.04}.items():
        archs = {}
        for anchor in at:
            if (anchor.w_bits, anchor.a_bits) == (w_bits, a_bits):
                archs.setdefault(anchor.arch, []).append(anchor.gain)
        means = [sum(gains) / len(gains) for gains in archs.values()]
        assert sum(means) / len(means) == pytest.approx(expected, abs=0.06)


def test_other_factors_have_no_published_figures():
    assert load_anchors("pca-dim") == []
