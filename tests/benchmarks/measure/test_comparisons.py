"""Paired statistics against figures by hand and naive ones."""

from math import comb

import pytest

from benchmarks.measure.comparisons import compare, modes_of, summarize
from benchmarks.measure.protocol import Setting
from tests.benchmarks.rows import make_measurement, wrong

FIGURES = ("ci_low", "ci_high", "p_value")
INTERVALS = [f"{kind}_{name}" for kind in ("networks", "seeds") for name in FIGURES]


def two_sided(won, lost):
    """Exact binomial test of a fair coin."""
    total = won + lost
    return min(1, 2 * sum(comb(total, k) for k in range(min(won, lost) + 1)) / 2**total)


def test_every_correction_is_compared_with_its_own_baseline():
    lines = {line.mode: line for line in compare([make_measurement(Setting("qdrop", 2, 4, 7))])}
    assert list(lines) == ["plain_affine", "cat_paper", "output", "layers"]
    found = {mode: (line.top1, line.delta, line.won, line.lost) for mode, line in lines.items()}
    assert found == {
        "plain_affine": (91.0, 1.0, 5, 0),
        "cat_paper": (92.6, 2.6, 25, 12),
        "output": (92.0, 2.0, 15, 5),
        "layers": (93.0, 3.0, 20, 5),
    }
    for line in lines.values():
        assert (line.method, line.w_bits, line.a_bits, line.seed) == ("qdrop", 2, 4, 7)
        assert (line.n_eval, line.lq_top1) == (500, 90.0)
        assert line.networks_p_value == pytest.approx(two_sided(line.won, line.lost), rel=1e-3)


def test_interval_is_that_of_the_paired_mean():
    """20 won and 5 lost of 500: mean 3 points, standard error sqrt((25 / 500 - 0.03 ** 2) / 500)."""
    error = 100 * ((25 / 500 - 0.03**2) / 500) ** 0.5
    line = compare([make_measurement()])[-1]
    assert line.networks_ci_low == pytest.approx(3 - 1.96 * error, abs=0.15)
    assert line.networks_ci_high == pytest.approx(3 + 1.96 * error, abs=0.15)


def test_one_seed_is_summed_up_by_itself():
    measured = [make_measurement(Setting(method, 2, 2, 0)) for method in ("rtn", "qdrop")]
    for line, summary in zip(compare(measured), summarize(measured), strict=True):
        names = ("method", "mode", "lq_top1", "top1", "delta", *INTERVALS, "won", "lost")
        assert [getattr(summary, name) for name in names] == [getattr(line, name) for name in names]
        for name in FIGURES:
            assert getattr(line, f"seeds_{name}") == getattr(line, f"networks_{name}")
        assert (summary.seeds, summary.top1_std, summary.delta_std) == (1, None, None)


def test_seeds_are_summed_up_by_mean_and_standard_deviation():
    measured = [make_measurement(Setting("rtn", 2, 2, seed), won=won) for seed, won in enumerate((10, 15, 35))]
    line = summarize(measured)[-1]
    assert (line.mode, line.seeds) == ("layers", 3)
    assert (line.delta, line.delta_std) == (3.0, pytest.approx(7**0.5, abs=1e-4))
    assert (line.top1, line.top1_std, line.lq_top1, line.lq_std) == (93.0, line.delta_std, 90.0, 0.0)
    assert line.seeds_ci_low < 0 < line.networks_ci_low < line.networks_ci_high < 6 < line.seeds_ci_high
    assert line.networks_p_value < 0.001 < 0.05 < line.seeds_p_value


def test_the_same_images_won_at_every_seed_tell_no_more_than_one_seed():
    alike = summarize([make_measurement(Setting("rtn", 2, 2, seed)) for seed in (0, 1, 2)])[-1]
    single = summarize([make_measurement()])[-1]
    for name in ("networks_ci_low", "networks_ci_high", "networks_p_value", "won", "lost"):
        assert getattr(alike, name) == getattr(single, name)
    assert alike.seeds_ci_low == pytest.approx(single.seeds_ci_low, abs=0.05)
    assert alike.seeds_ci_high == pytest.approx(single.seeds_ci_high, abs=0.05)


def test_images_count_by_what_most_seeds_do_with_them():
    """One image is won at both seeds, one at one of them, one is won and lost, one lost."""
    first, second = make_measurement(won=2, lost=0), make_measurement(Setting("rtn", 2, 2, 1), won=1, lost=0)
    first.predictions["lq"][[497, 498]] = 1  # 497: won at the first seed
    first.predictions["layers"][498] = 1
    second.predictions["layers"][[497, 499]] = 1  # 497: lost at the second seed, 499: lost
    line = summarize([first, second])[-1]
    assert (line.won, line.lost) == (2, 1)
    assert line.networks_p_value == pytest.approx(two_sided(2, 1), rel=1e-3)


def test_only_corrections_that_every_seed_has_are_summed_up():
    measured = [make_measurement(), make_measurement(Setting("rtn", 2, 2, 1), cat_paper=False)]
    assert modes_of(measured) == ["plain_affine", "output", "layers"]
    assert [line.mode for line in summarize(measured)] == ["plain_affine", "output", "layers"]
    every = ["plain_affine", "cat_paper", "output", "layers"]
    assert [line.mode for line in compare(measured)] == [*every, "plain_affine", "output", "layers"]


def test_planted_predictions_are_as_described():
    assert wrong(range(3)).tolist()[:4] == [1, 1, 1, 0]
