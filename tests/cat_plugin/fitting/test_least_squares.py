import numpy as np
import pytest
import torch

from cat_plugin.fitting.least_squares import fit_affine, fit_deviations, fit_shared
from tests.cat_plugin.helpers import paired_logits
from tests.reference import lstsq_per_cluster


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


def test_shared_map_equals_naive_empirical_bayes():
    z, _, residual = features_and_residual(signal=0.1)
    design = np.hstack([z.numpy(), np.ones((400, 1))])
    solution = np.linalg.lstsq(design, residual.numpy(), rcond=None)[0]
    error = ((residual.numpy() - design @ solution) ** 2).sum() / (5 * (400 - 7))
    inverse = np.linalg.inv(np.cov(z.numpy().T, bias=True) * 400)
    expected = np.zeros((6, 5))
    for feature in range(6):
        noise = inverse[feature, feature] * error
        signal = max((solution[feature] ** 2).mean() - noise, 0)
        expected[feature] = solution[feature] * signal / (signal + noise)
    coefficients, offset = fit_shared(z, residual)
    torch.testing.assert_close(coefficients, torch.from_numpy(expected), atol=1e-8, rtol=1e-6)
    torch.testing.assert_close(offset, residual.mean(0) - z.mean(0) @ coefficients)


def test_shared_map_keeps_what_the_data_support():
    z, planted, residual = features_and_residual(signal=3.0)
    coefficients, _ = fit_shared(z, residual)
    torch.testing.assert_close(coefficients[:3], planted[:3], atol=0.25, rtol=0)
    assert coefficients[3:].abs().max() < 0.1
    assert fit_shared(z, residual - z @ planted)[0].abs().max() < 0.1


def test_shared_map_without_features_is_the_mean():
    residual = torch.randn(20, 5, dtype=torch.float64)
    coefficients, offset = fit_shared(torch.empty(20, 0, dtype=torch.float64), residual)
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
