"""Intervals against naive ones, closed forms, and their coverage where the truth is known."""

import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.measure.intervals import crossed_interval, figures_over_seeds, paired_figures
from cat_plugin import metrics
from tests.benchmarks.measure.test_comparisons import two_sided

SIMULATIONS = 400
IMAGES = 400
WINS, LOSES = 1.0, 1.5
"""Standard deviations above and below which the latent gain of an image puts it right or wrong."""


def test_figures_equal_a_naive_bootstrap():
    generator = torch.Generator().manual_seed(0)
    difference = torch.randint(-2, 3, (400,), generator=generator).double() / 2 + (torch.arange(400) % 10 == 0) / 2
    figures = paired_figures(difference)
    values, draws = 100 * difference.numpy(), np.random.default_rng(1)
    means = [draws.choice(values, len(values)).mean() for _ in range(4000)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert figures["ci_low"] == pytest.approx(low, abs=0.6) and figures["ci_high"] == pytest.approx(high, abs=0.6)
    won, lost = (values > 0).sum(), (values < 0).sum()
    assert (figures["won"], figures["lost"]) == (won, lost)
    assert figures["p_value"] == pytest.approx(two_sided(int(won), int(lost)), rel=1e-3)


def crossed(seeds, seed_share, generator):
    """Changes `(seeds, images)` by a latent normal gain: an effect of the seed with this share of the variance, one of
    the image, and one of both."""
    of_seed, of_image, of_both = np.sqrt([seed_share, 0.6 * (1 - seed_share), 0.4 * (1 - seed_share)])
    latent = of_seed * generator.normal(size=(seeds, 1)) + of_image * generator.normal(size=(1, IMAGES))
    latent = latent + of_both * generator.normal(size=(seeds, IMAGES))
    return torch.from_numpy((latent > WINS).astype(float) - (latent < -LOSES))


@pytest.fixture
def few_resamples(monkeypatch):
    """Thousands of bootstraps would take minutes."""
    monkeypatch.setattr(metrics, "BOOTSTRAP_SAMPLES", 400)


def coverage(seeds, seed_share):
    """Percent of simulations whose intervals hold what new draws of seeds and images gain in the mean."""
    truth = 100 * (stats.norm.sf(WINS) - stats.norm.sf(LOSES))
    generator, held = np.random.default_rng(seeds), {"seeds": 0, "networks": 0}
    for _ in range(SIMULATIONS):
        found = figures_over_seeds(crossed(seeds, seed_share, generator))
        for kind in held:
            held[kind] += found[f"{kind}_ci_low"] <= truth <= found[f"{kind}_ci_high"]
    return tuple(100 * each / SIMULATIONS for each in held.values())


@pytest.mark.parametrize(("seeds", "seed_share"), [(2, 0.2), (3, 0.02), (3, 0.2), (5, 0.2)])
def test_interval_over_seeds_holds_what_new_draws_gain_and_that_of_the_networks_does_not(
    few_resamples, seeds, seed_share
):
    over_seeds, of_networks = coverage(seeds, seed_share)
    assert 92 <= over_seeds <= 98
    assert of_networks < (60 if seed_share > 0.1 else 90)


def test_without_a_spread_of_seeds_both_cover(few_resamples):
    over_seeds, of_networks = coverage(5, 0.0)
    assert over_seeds >= of_networks >= 92


def test_p_value_is_rarely_small_where_nothing_is_gained(few_resamples):
    """Wins and losses are as likely; with a spread of seeds the p-value of the networks is not to be believed."""
    generator, small = np.random.default_rng(0), {"seeds": 0, "networks": 0}
    for _ in range(SIMULATIONS):
        latent = 0.3 * generator.normal(size=(3, 1)) + generator.normal(size=(1, IMAGES))
        latent = latent + generator.normal(size=(3, IMAGES))
        found = figures_over_seeds(torch.from_numpy((latent > 2).astype(float) - (latent < -2)))
        for kind in small:
            small[kind] += found[f"{kind}_p_value"] < 0.05
    assert small["seeds"] <= 0.08 * SIMULATIONS < 0.3 * SIMULATIONS < small["networks"]


def test_where_images_do_not_differ_it_is_students_t():
    """Gains of 1, 2 and 6: mean 3, standard deviation sqrt(7)."""
    gains = torch.tensor([1.0, 2.0, 6.0]).double()[:, None].expand(3, 50)
    low, high, p_value = crossed_interval(gains)
    by_scipy = stats.ttest_1samp([1.0, 2.0, 6.0], 0.0)
    assert (low, high) == pytest.approx(tuple(by_scipy.confidence_interval(0.95)))
    assert p_value == pytest.approx(by_scipy.pvalue)


def test_where_seeds_do_not_differ_it_is_the_error_of_the_mean_over_images():
    gains = torch.from_numpy(np.random.default_rng(0).normal(0.2, 1, 300))
    low, high, p_value = crossed_interval(gains.expand(4, 300))
    error = stats.sem(gains)
    assert (low, high) == pytest.approx(stats.norm.interval(0.95, gains.mean(), error))
    assert p_value == pytest.approx(2 * stats.norm.sf(gains.mean() / error))


def test_margin_is_that_of_the_components_of_variance():
    """Of an analysis of variance in loops."""
    gains = np.random.default_rng(1).normal(size=(3, 40)) + np.random.default_rng(2).normal(size=(1, 40))
    of_seeds, of_images = [row.mean() for row in gains], [column.mean() for column in gains.T]
    rest = [
        (gains[seed, image] - of_seeds[seed] - of_images[image] + gains.mean()) ** 2
        for seed in range(3)
        for image in range(40)
    ]
    image_variance = np.var(of_images, ddof=1) - sum(rest) / (2 * 39) / 3
    margin = np.hypot(
        stats.t.ppf(0.975, 2) * np.std(of_seeds, ddof=1) / 3**0.5, stats.norm.ppf(0.975) * (image_variance / 40) ** 0.5
    )
    low, high, _ = crossed_interval(torch.from_numpy(gains))
    assert (low, high) == pytest.approx((gains.mean() - margin, gains.mean() + margin))


def test_p_value_is_small_exactly_where_the_interval_leaves_zero_out():
    generator, seen = np.random.default_rng(3), set()
    for shift in np.linspace(-3, 3, 25):
        low, high, p_value = crossed_interval(torch.from_numpy(shift + generator.normal(size=(3, 30))))
        assert (p_value < 0.05) == (not low <= 0 <= high)
        seen.add(p_value < 0.05)
    assert seen == {True, False}


def test_order_of_seeds_and_images_does_not_matter():
    changes = crossed(4, 0.1, np.random.default_rng(4))
    found = figures_over_seeds(changes)
    assert figures_over_seeds(changes.flip(0)[:, torch.randperm(IMAGES)]) == pytest.approx(found)


def test_one_seed_has_the_interval_of_its_network():
    changes = crossed(1, 0.1, np.random.default_rng(5))
    found, own = figures_over_seeds(changes), paired_figures(changes[0])
    for name in ("ci_low", "ci_high", "p_value"):
        assert found[f"seeds_{name}"] == found[f"networks_{name}"] == own[name]
    assert (found["won"], found["lost"]) == (own["won"], own["lost"])


@pytest.mark.parametrize("seeds", [2, 3, 6])
def test_interval_over_seeds_is_never_narrower(seeds):
    generator = np.random.default_rng(seeds)
    for _ in range(30):
        found = figures_over_seeds(crossed(seeds, 0.0, generator))
        assert found["seeds_ci_low"] <= found["networks_ci_low"] <= found["networks_ci_high"] <= found["seeds_ci_high"]
        assert found["seeds_p_value"] >= found["networks_p_value"]


def test_nothing_changed_is_no_gain():
    found = figures_over_seeds(torch.zeros(3, 20))
    assert all(found[f"{kind}_{end}"] == 0 for kind in ("networks", "seeds") for end in ("ci_low", "ci_high"))
    assert found["seeds_p_value"] == found["networks_p_value"] == 1
    assert crossed_interval(torch.ones(2, 5)) == (1.0, 1.0, 0.0)
