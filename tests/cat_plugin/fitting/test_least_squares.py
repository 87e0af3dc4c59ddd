import pytest
import torch

from cat_plugin.fitting.least_squares import AffineSums, DeviationSums, SharedSums, fit_affine
from tests.cat_plugin.helpers import paired_logits
from tests.reference import lstsq_per_cluster, shrunk_deviations, shrunk_least_squares


def test_table_computed_by_hand():
    q = torch.tensor([[0.0], [2.0], [4.0], [5.0], [1.0]])
    f = torch.tensor([[1.0], [3.0], [8.0], [9.0], [6.0]])
    gamma, beta = fit_affine(q, f, torch.tensor([0, 0, 0, 2, 1]), 4)
    # Cluster 0: means 2 and 4, covariance 14/3, variance 8/3. One image: its target. None: identity.
    assert gamma[:, 0].tolist() == pytest.approx([1.75, 0.0, 0.0, 1.0])
    assert beta[:, 0].tolist() == pytest.approx([0.5, 6.0, 9.0, 0.0])


def test_equals_lstsq():
    q, f = paired_logits(300, 7)
    ids = torch.arange(300) % 5
    expected = lstsq_per_cluster(q.numpy(), f.numpy(), ids.numpy(), 5)
    for fitted, reference in zip(fit_affine(q, f, ids, 5), expected, strict=True):
        torch.testing.assert_close(fitted, torch.from_numpy(reference), rtol=1e-9, atol=1e-9)


def test_planted_map_is_recovered():
    q, _ = paired_logits(300, 7)
    ids = torch.arange(300) % 4
    gamma, beta = 1 + torch.rand(4, 7, dtype=torch.float64), torch.randn(4, 7, dtype=torch.float64)
    fitted = fit_affine(q, gamma[ids] * q + beta[ids], ids, 4)
    torch.testing.assert_close(fitted, (gamma, beta))


def test_identical_outputs_give_exactly_the_identity_slope():
    q, _ = paired_logits(100, 7)
    gamma, beta = fit_affine(q, q, torch.arange(100) % 3, 3)
    assert torch.equal(gamma, torch.ones(3, 7, dtype=torch.float64))
    assert not beta.any()


def test_order_of_images_does_not_matter():
    q, f = paired_logits(200, 7)
    ids, order = torch.arange(200) % 6, torch.randperm(200)
    torch.testing.assert_close(fit_affine(q, f, ids, 6), fit_affine(q[order], f[order], ids[order], 6))


def test_large_offset_keeps_its_digits():
    q, f = paired_logits(200, 3)
    ids = torch.arange(200) % 2
    gamma, _ = fit_affine(q, f, ids, 2)
    moved, _ = fit_affine(q + 1e8, f, ids, 2)
    torch.testing.assert_close(moved, gamma, rtol=1e-5, atol=1e-6)


def test_constant_logit_maps_to_the_mean():
    f = torch.tensor([[1.0], [5.0]])
    gamma, beta = fit_affine(torch.full((2, 1), 2.0), f, torch.zeros(2, dtype=torch.int64), 1)
    assert (gamma.item(), beta.item()) == (0.0, 3.0)


def features_and_residual(signal, seed=0, n_images=400):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n_images, 6, generator=generator, dtype=torch.float64)
    coefficients = signal * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    coefficients[3:] = 0
    noise = torch.randn(n_images, 5, generator=generator, dtype=torch.float64)
    return z, coefficients, z @ coefficients + 2 + noise


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_shared_map_equals_naive_empirical_bayes(share):
    z, _, residual = features_and_residual(signal=0.1)
    expected = shrunk_least_squares(z.numpy(), residual.numpy(), share)
    coefficients, offset = SharedSums(6, 5).add(z, residual).solve(share)
    torch.testing.assert_close(coefficients, torch.from_numpy(expected[0]), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(offset, torch.from_numpy(expected[1]))
    torch.testing.assert_close(offset, residual.mean(0) - z.mean(0) @ coefficients)


def test_shared_map_keeps_what_the_data_support():
    z, planted, residual = features_and_residual(signal=3.0)
    coefficients, _ = SharedSums(6, 5).add(z, residual).solve()
    torch.testing.assert_close(coefficients[:3], planted[:3], atol=0.25, rtol=0)
    assert coefficients[3:].abs().max() < 0.1
    assert SharedSums(6, 5).add(z, residual - z @ planted).solve()[0].abs().max() < 0.1


def test_shared_map_without_features_is_the_mean():
    residual = torch.randn(20, 5, dtype=torch.float64)
    coefficients, offset = SharedSums(0, 5).add(torch.empty(20, 0, dtype=torch.float64), residual).solve()
    assert coefficients.shape == (0, 5)
    torch.testing.assert_close(offset, residual.mean(0))


def clustered(deviation, noise, seed=0, n_images=600):
    """q, residual with a planted slope and offset in each of 4 clusters, ids, and the planted values."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(n_images, 5, generator=generator, dtype=torch.float64) + 1
    ids = torch.arange(n_images) % 4
    slope, offset = deviation * torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    residual = q * slope[ids] + offset[ids] + noise * torch.randn(n_images, 5, generator=generator, dtype=torch.float64)
    return q, residual, ids, slope, offset


def fit_deviations(q, residual, ids, num_clusters, **options):
    return DeviationSums(num_clusters, q.mean(dim=0)).add(q, residual, ids).solve(**options)


@pytest.mark.parametrize("keep_slope", [False, True])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_deviations_equal_naive_empirical_bayes(share, keep_slope):
    """Clusters of 2, which says nothing, 6, 150 and 200 images, and an empty one."""
    ids = torch.arange(5).repeat_interleave(torch.tensor([2, 6, 150, 0, 200]))
    q, residual, *_ = clustered(deviation=0.1, noise=1.0, n_images=len(ids))
    residual = residual + 0.3 * ids.unsqueeze(1) * (q + 1)
    expected = shrunk_deviations(q.numpy(), residual.numpy(), ids.numpy(), 5, share, keep_slope)
    found = fit_deviations(q, residual, ids, 5, share=share, keep_slope=keep_slope)
    for part, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(part, torch.from_numpy(reference), atol=1e-9, rtol=1e-9)
        assert part[[1, 2, 4]].all()
        assert not part[[0, 3]].any()


def test_deviations_without_noise_are_least_squares():
    q, residual, ids, slope, offset = clustered(deviation=1.0, noise=1e-6)
    found = fit_deviations(q, residual, ids, 4)
    torch.testing.assert_close(found[0], slope, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1], offset, atol=1e-5, rtol=1e-5)


def test_deviations_of_noise_are_next_to_none():
    q, residual, ids, _, _ = clustered(deviation=0.0, noise=1.0)
    slope, offset = fit_deviations(q, residual, ids, 4)
    free = fit_affine(q, residual, ids, 4)
    assert slope.abs().mean() < 0.6 * free[0].abs().mean()
    assert (offset + slope).abs().mean() < 0.6 * (free[1] + free[0]).abs().mean()


def test_cluster_of_few_images_inherits():
    q, residual, ids, _, _ = clustered(deviation=1.0, noise=1.0)
    ids[ids == 3] = 2
    ids[:2] = 3
    slope, offset = fit_deviations(q, residual, ids, 5)
    assert slope[3:].abs().max() == offset[3:].abs().max() == 0
    assert slope[2].abs().min() > 0


def test_mean_slope_is_kept_on_request():
    q, residual, ids, _, _ = clustered(deviation=0.3, noise=0.1)
    plain, kept = (fit_deviations(q, residual + 0.7 * q, ids, 4, keep_slope=keep)[0] for keep in (False, True))
    power = torch.stack([q[ids == k].var(dim=0, correction=0) * (ids == k).sum() for k in range(4)])
    assert ((power * plain).sum(0) / power.sum(0) - 0.7).abs().max() < 0.3
    assert ((power * kept).sum(0) / power.sum(0)).abs().max() < 0.05


def halves(sums, *rows):
    """The sums after all rows at once, and after those from the 40th on, none, and the first 40."""
    parts = [[part[chosen] for part in rows] for chosen in (slice(40, None), slice(0, 0), slice(40))]
    whole, pieces = (made.add(*first) for made, first in zip((sums(), sums()), (rows, parts[0]), strict=True))
    for part in parts[1:]:
        pieces.add(*part)
    return whole, pieces


@pytest.mark.parametrize("kind", ["affine", "shared", "deviations"])
def test_sums_of_chunks_in_any_order_are_those_of_all_rows(kind):
    q, residual, ids, *_ = clustered(deviation=0.2, noise=1.0)
    if kind == "affine":
        found = halves(lambda: AffineSums(q[0], residual[0]), q, residual)
    elif kind == "shared":
        found = halves(lambda: SharedSums(5, 5), q, residual)
    else:
        found = halves(lambda: DeviationSums(4, q[0]), q, residual, ids)
    for whole, pieces in zip(*(sums.solve() for sums in found), strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-9, rtol=1e-9)
        assert whole.abs().max() > 0.01


def test_affine_sums_equal_the_fit_with_one_cluster_wherever_they_count_from():
    q, f = paired_logits(200, 7)
    expected = fit_affine(q, f, torch.zeros(200, dtype=torch.int64), 1)
    for move in (0.0, 1e6):
        near = q.mean(dim=0) + move + 0.5, f.mean(dim=0) + move - 0.5
        gamma, beta = AffineSums(*near).add(q + move, f + move).solve()
        torch.testing.assert_close(gamma, expected[0], rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(beta, expected[1] + move * (1 - expected[0]), rtol=1e-8, atol=1e-8 * max(move, 1))
