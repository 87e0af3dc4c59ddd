"""Which images a draw consists of, and every figure of a row against one computed here."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
import torch

from benchmarks.measure.corrections import corrections
from benchmarks.measure.draws import FIT_SEED, Cell, Draw, cells, measure
from benchmarks.measure.paired_logits import PairedLogits, Source
from cat_plugin import CATConfig, fit_cluster_affine
from tests.benchmarks.logits import make_arrays
from tests.benchmarks.rows import same
from tests.reference import lstsq_per_cluster


def source(fresh, name="a", load=None):
    return Source(name=name, digest="0123456789abcdef", fresh=fresh, load=load)


def make_cell(draw, mode):
    return Cell(source(300), 100, draw, mode, corrections(100, FIT_SEED)[mode])


@pytest.fixture(scope="module")
def pairs():
    arrays = {name: torch.from_numpy(values) for name, values in make_arrays(300).items()}
    return PairedLogits(
        fit_q=arrays["q_calib"],
        fit_f=arrays["f_calib"],
        test_q=arrays["q_test"],
        test_f=arrays["f_test"],
        labels=arrays["y_test"],
    )


def naive_correction(pairs, rows, mode):
    """Corrected test logits."""
    q, f = pairs.fit_q[rows[0] : rows[1]], pairs.fit_f[rows[0] : rows[1]]
    if mode == "plain_affine":
        slope, offset = lstsq_per_cluster(q.double().numpy(), f.double().numpy(), np.zeros(len(q), dtype=int), 1)
        return slope * pairs.test_q.numpy() + offset
    config = CATConfig.paper(num_clusters=64, alpha=0.4) if mode == "cat_paper" else CATConfig(layers="none")
    return fit_cluster_affine(q, f, config)(pairs.test_q).numpy()


@pytest.mark.parametrize("mode", ["plain_affine", "cat_paper", "output"])
@pytest.mark.parametrize(("draw", "rows"), [(0, (0, 100)), (2, (200, 300))])
def test_figures_equal_those_by_hand(pairs, mode, draw, rows):
    gain = measure(make_cell(draw, mode), pairs).row
    corrected = naive_correction(pairs, rows, mode)
    labels = pairs.labels.tolist()
    before = [int(row.argmax()) == label for row, label in zip(pairs.test_q.numpy(), labels, strict=True)]
    after = [int(row.argmax()) == label for row, label in zip(corrected, labels, strict=True)]
    full = [int(row.argmax()) == label for row, label in zip(pairs.test_f.numpy(), labels, strict=True)]
    won = sum(new and not old for old, new in zip(before, after, strict=True))
    lost = sum(old and not new for old, new in zip(before, after, strict=True))
    assert 0 < lost != won > 0, "figures that coincide would hide a mix-up"
    total = won + lost
    p_value = min(1, 2 * sum(comb(total, k) for k in range(min(won, lost) + 1)) / 2**total)

    assert (gain.source, gain.images, gain.draw, gain.mode, gain.n_eval) == ("a", 100, draw, mode, 300)
    assert (gain.won, gain.lost) == (won, lost)
    assert gain.gain == pytest.approx(100 * (won - lost) / 300, abs=1e-4)
    assert gain.lq_top1 == pytest.approx(100 * sum(before) / 300, abs=1e-4)
    assert gain.top1 == pytest.approx(100 * sum(after) / 300, abs=1e-4)
    assert gain.fp_top1 == pytest.approx(100 * sum(full) / 300, abs=1e-4)
    assert gain.p_value == pytest.approx(p_value, rel=1e-3)
    assert gain.ci_low < gain.gain < gain.ci_high


def test_draws_of_a_size_are_disjoint_and_within_the_fresh_images():
    grid = cells([source(1041), source(300, "b")], [64, 256, 1024], max_draws=5)
    found = {}
    for cell in grid:
        found.setdefault((cell.source.name, cell.images, cell.mode), []).append(set(range(1041)[cell.rows]))
    counts = {key[:2]: len(draws) for key, draws in found.items()}
    assert counts == {("a", 64): 5, ("a", 256): 4, ("a", 1024): 1, ("b", 64): 4, ("b", 256): 1}
    for (name, images, _), draws in found.items():
        assert all(len(draw) == images for draw in draws)
        assert not any(one & other for one, other in combinations(draws, 2))
        assert max(set().union(*draws)) < (1041 if name == "a" else 300)
    assert len({cell.name for cell in grid}) == len(grid)


def test_papers_correction_needs_as_many_images_as_clusters():
    modes = {images: [cell.mode for cell in cells([source(64)], [images], 1)] for images in (63, 64)}
    assert modes == {63: ["plain_affine", "output"], 64: ["plain_affine", "cat_paper", "output"]}


def test_stored_row_comes_back(pairs, tmp_path):
    draw = measure(make_cell(0, "plain_affine"), pairs)
    draw.store(tmp_path / "row.json")
    assert same(Draw.load(tmp_path / "row.json"), draw)
    stored = (tmp_path / "row.json").read_text()
    (tmp_path / "row.json").write_text(stored.replace('"plain_affine"', '"cat"'))
    assert Draw.load(tmp_path / "row.json").row.mode == "output", "as the mode was called before there were layers"
    draw.verify("row")
