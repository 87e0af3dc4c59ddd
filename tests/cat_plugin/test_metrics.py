import math

import pytest
import torch
from scipy.stats import binom

from cat_plugin import CATError
from cat_plugin.metrics import (
    ClassChanges,
    agreement,
    decimals,
    kl_divergence,
    paired_statistics,
    standard_error,
    top_k_correct,
)


def test_top_k_table():
    logits = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [2.0, 3.0, 1.0]])
    targets = torch.tensor([0, 1, 2])
    assert top_k_correct(logits, targets).tolist() == [True, False, False]
    assert top_k_correct(logits, targets, 2).tolist() == [True, True, False]
    assert top_k_correct(logits, targets, 5).tolist() == [True, True, True]


def test_small_numbers_are_not_shown_as_zeros():
    assert [decimals(value) for value in (0.0, 0.5, 12.34567, 5e-5)] == ["0.0000", "0.5000", "12.3457", "0.0001"]
    assert [decimals(value, "+") for value in (3.14e-7, -4.98765e-5, math.nan)] == ["+3.1e-07", "-5e-05", "+nan"]


def test_agreement_table():
    f = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    out = torch.tensor([[5.0, 0.0], [0.0, 5.0], [0.0, 5.0], [0.0, 1.0]])
    assert agreement(f, out) == 75.0


def test_kl_table():
    f = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    out = torch.tensor([[0.5, 0.5], [0.5, 0.5]]).log() + 7  # a constant added to all logits says nothing
    # .75 log 1.5 + .25 log .5 = 0.13081, and 0 for the second image
    assert kl_divergence(f, out) == pytest.approx(0.130812 / 2, abs=1e-6)
    assert kl_divergence(f, f) == 0


def test_confident_logits_have_a_finite_kl():
    f = torch.tensor([[1000.0, 0.0]])
    assert kl_divergence(f, -f) == pytest.approx(1000.0)


def _outcomes(won, lost, both, neither):
    quantized = [False] * won + [True] * lost + [True] * both + [False] * neither
    corrected = [True] * won + [False] * lost + [True] * both + [False] * neither
    return torch.tensor(quantized), torch.tensor(corrected)


def test_paired_statistics_table():
    found = paired_statistics(*_outcomes(won=8, lost=2, both=80, neither=10))
    assert (found.images, found.won, found.lost, found.delta) == (100, 8, 2, 6.0)
    # Two-sided exact test of 2 in 10: 2 * (1 + 10 + 45) / 1024
    assert found.p_value == pytest.approx(2 * 56 / 1024)


def test_class_changes_table():
    targets = torch.tensor([0, 0, 0, 2, 2, 1])
    before = torch.tensor([True, False, False, True, False, True])
    after = torch.tensor([False, True, True, True, False, False])
    assert ClassChanges.of(targets, before, after, 4) == ClassChanges(4, labels=(0, 1), won=(2, 0), lost=(1, 1))


def test_p_value_against_the_binomial_distribution():
    found = paired_statistics(*_outcomes(won=30, lost=45, both=500, neither=25))
    assert found.p_value == pytest.approx(2 * binom.cdf(30, 75, 0.5))


def test_interval_equals_resampling_of_images():
    quantized, corrected = _outcomes(won=40, lost=20, both=300, neither=40)
    found = paired_statistics(quantized, corrected, seed=1)
    gains = corrected.double() - quantized.double()
    drawn = torch.randint(400, (4000, 400), generator=torch.Generator().manual_seed(0))
    low, high = torch.quantile(100 * gains[drawn].mean(dim=1), torch.tensor([0.025, 0.975], dtype=torch.float64))
    assert found.ci_low == pytest.approx(low.item(), abs=0.3)
    assert found.ci_high == pytest.approx(high.item(), abs=0.3)
    # Normal approximation: standard error sqrt((.15 - .05^2) / 400) = 1.92 points
    assert found.ci_high - found.ci_low == pytest.approx(2 * 1.96 * 1.92, abs=0.3)


def test_no_difference():
    found = paired_statistics(*_outcomes(won=0, lost=0, both=5, neither=5))
    assert (found.delta, found.ci_low, found.ci_high, found.p_value) == (0, 0, 0, 1)


def test_seed_and_errors():
    outcomes = _outcomes(5, 3, 20, 2)
    assert paired_statistics(*outcomes, seed=3) == paired_statistics(*outcomes, seed=3)
    for wrong in (torch.ones(3, dtype=torch.bool), torch.ones(0, dtype=torch.bool)):
        with pytest.raises(CATError, match=r"expected \(N,\) twice"):
            paired_statistics(wrong, torch.ones(0, dtype=torch.bool))


def test_standard_error_of_dependent_rows():
    values = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    plain = standard_error(values)
    assert plain == pytest.approx(values.std().item() / 50**0.5)
    assert standard_error(values, torch.arange(50).flip(0)) == pytest.approx(plain)
    copies = torch.arange(50).repeat(7)
    assert standard_error(values[copies], copies) == pytest.approx(plain)
    assert standard_error(values, torch.zeros(50)) == pytest.approx(0, abs=1e-12)


def test_statistics_of_positions_are_those_of_images():
    quantized, corrected = _outcomes(won=30, lost=10, both=100, neither=60)
    once = paired_statistics(quantized, corrected, images=torch.arange(200))
    owners = torch.arange(200).repeat_interleave(9)
    many = paired_statistics(quantized[owners], corrected[owners], images=owners)
    assert (many.images, many.won, many.lost) == (1800, 270, 90)
    assert (many.delta, many.ci_low, many.ci_high, many.p_value) == pytest.approx(
        (once.delta, once.ci_low, once.ci_high, once.p_value)
    )
    plain = paired_statistics(quantized, corrected)
    assert (once.ci_low, once.ci_high) == pytest.approx((plain.ci_low, plain.ci_high), abs=0.4)
    assert once.p_value == pytest.approx(plain.p_value, abs=0.002)
    assert paired_statistics(quantized, quantized, images=torch.arange(200)).p_value == 1.0
