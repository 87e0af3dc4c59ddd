import os
from pathlib import Path

import numpy as np
import pytest
import torch

from cat_plugin import CATConfig, fit_cluster_affine
from cat_plugin.fitting.clustering import fit_clusters
from cat_plugin.fitting.paper import cross_fitted
from tests.cat_plugin.helpers import paired_logits
from tests.reference import PaperCAT, lstsq_per_cluster

LOGITS = sorted(Path(os.environ["CAT_LOGITS"]).glob("*.npz")) if "CAT_LOGITS" in os.environ else []


def assert_equals_reference(q, f, fresh, num_clusters, alpha=0.4):
    correction = fit_cluster_affine(q, f, CATConfig.paper(num_clusters, alpha=alpha))
    reference = PaperCAT(num_clusters, pca_dim=50, alpha=alpha).fit(q.double().numpy(), f.double().numpy())
    for part in (q, fresh):
        expected = torch.from_numpy(reference.apply(part.double().numpy()))
        assert (correction(part).double() - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("num_clusters", [1, 8, 20])
@pytest.mark.parametrize("classes", [10, 120])
def test_equals_naive_reference(classes, num_clusters, dtype):
    q, f = paired_logits(600, classes, dtype=dtype)
    fresh, _ = paired_logits(300, classes, seed=1, dtype=dtype)
    assert_equals_reference(q, f, fresh, num_clusters)


@pytest.mark.skipif(not LOGITS, reason="CAT_LOGITS names no folder of *.npz files")
@pytest.mark.parametrize("path", LOGITS, ids=lambda path: path.stem)
def test_equals_naive_reference_on_real_logits(path):
    with np.load(path) as data:
        q, f, fresh = (torch.from_numpy(data[name].astype(np.float64)) for name in ("q_calib", "f_calib", "q_test"))
    for images in (1024, len(q)):
        assert_equals_reference(q[:images], f[:images], fresh, 64)
        # In float32 results agree to about 1e-6 relative, except for images on a border that it cannot resolve.
        config = CATConfig.paper()
        wide, narrow = (
            fit_cluster_affine(q[:images].to(t), f[:images].to(t), config) for t in (q.dtype, torch.float32)
        )
        same = wide.assign(fresh) == narrow.assign(fresh.float())
        assert (~same).sum() <= len(fresh) / 1000
        torch.testing.assert_close(narrow(fresh.float())[same].double(), wide(fresh)[same], atol=1e-5, rtol=1e-6)


def test_full_correction_is_least_squares():
    q, f = paired_logits(500, 10)
    config = CATConfig.paper(6, alpha=1.0)
    correction = fit_cluster_affine(q, f, config)
    ids = fit_clusters(q, 6, config).ids
    assert torch.equal(correction.assign(q), ids)
    gamma, beta = lstsq_per_cluster(q.numpy(), f.numpy(), ids.numpy(), 6)
    torch.testing.assert_close(correction.scale, torch.from_numpy(gamma))
    torch.testing.assert_close(correction.shift, torch.from_numpy(beta))
    # Least squares: never further from f than the identity
    assert ((correction(q) - f) ** 2).mean() <= ((q - f) ** 2).mean()


def test_planted_map_is_recovered():
    q, _ = paired_logits(500, 10, noise=0.0)
    config = CATConfig.paper(5, alpha=1.0)
    ids = fit_clusters(q, 5, config).ids
    scale, shift = 1 + torch.rand(5, 10, dtype=torch.float64), torch.randn(5, 10, dtype=torch.float64)
    f = scale[ids] * q + shift[ids]
    torch.testing.assert_close(fit_cluster_affine(q, f, config)(q), f)


def test_alpha_interpolates():
    q, f = paired_logits(500, 10)
    none, some, full = (fit_cluster_affine(q, f, CATConfig.paper(6, alpha=alpha))(q) for alpha in (0.0, 0.3, 1.0))
    assert torch.equal(none, q)
    torch.testing.assert_close(some, q + 0.3 * (full - q))


def test_identical_outputs_give_the_identity():
    q, _ = paired_logits(300, 10)
    torch.testing.assert_close(fit_cluster_affine(q, q, CATConfig.paper(4, alpha=1.0))(q), q)


def test_repeated_images_and_one_image():
    q, f = paired_logits(3, 10)
    correction = fit_cluster_affine(q.repeat(20, 1), f.repeat(20, 1), CATConfig.paper(8, alpha=1.0))
    torch.testing.assert_close(correction(q), f)
    assert correction.num_clusters == 8
    assert fit_cluster_affine(q[:1], f[:1]).num_clusters == 1


def test_cross_fitted_outputs_are_those_of_five_separate_fits():
    q, f = paired_logits(203, 10, dtype=torch.float32)
    config = CATConfig.paper(4, seed=7)
    fold_of = torch.randperm(203, generator=torch.Generator().manual_seed(7)) % 5
    out = cross_fitted(q, f, config)
    for fold in range(5):
        train = (fold_of != fold).nonzero().squeeze(1)
        held_out = (fold_of == fold).nonzero().squeeze(1)
        assert len(held_out) in (40, 41)
        torch.testing.assert_close(out[held_out], fit_cluster_affine(q[train], f[train], config)(q[held_out]))


def test_positions_of_an_image_are_held_out_together():
    """What is odd about an image alone does not show in its own outputs, only where its positions are apart."""
    q, _ = paired_logits(60, 6)
    odd = q.clone()
    odd[:5] += torch.arange(30.0).reshape(5, 6)
    owners, config = torch.arange(12).repeat_interleave(5), CATConfig.paper(1, alpha=1.0)
    together = [cross_fitted(q, f, config, owners) for f in (q, odd)]
    apart = [cross_fitted(q, f, config) for f in (q, odd)]
    assert torch.equal(together[0][:5], together[1][:5])
    assert not torch.equal(together[0][5:], together[1][5:])
    assert not torch.equal(apart[0][:5], apart[1][:5])


@pytest.mark.parametrize("n_images", [2, 3, 7])
def test_few_images_are_cross_fitted_with_as_many_clusters_as_there_are(n_images):
    q, f = paired_logits(n_images, 10)
    config = CATConfig.paper(num_clusters=n_images, alpha=1.0)
    out = cross_fitted(q, f, config)
    nearest = torch.cdist(q, q).fill_diagonal_(torch.inf).argmin(dim=1)
    if n_images <= 5:  # each fold is one image, and each of the others a cluster of its own
        torch.testing.assert_close(out, f[nearest])
    assert torch.isfinite(out).all()


def test_one_image_cannot_be_held_out():
    assert cross_fitted(*paired_logits(1, 10), CATConfig.paper(1)) is None
