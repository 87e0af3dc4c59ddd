import pytest
import torch

from cat_plugin.affine import fit_affine
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
