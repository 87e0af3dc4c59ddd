import logging

import pytest
import torch

from cat_plugin import CATConfig
from cat_plugin.fitting.clustering import fit_clusters
from tests.cat_plugin.helpers import paired_logits
from tests.reference import PaperCAT


@pytest.mark.parametrize(("classes", "pca_dim"), [(10, 50), (120, 50), (30, 4)])
def test_folded_matrix_is_nearest_centroid(classes, pca_dim):
    q, f = paired_logits(400, classes)
    fresh, _ = paired_logits(300, classes, seed=1)
    clusters = fit_clusters(q, 9, CATConfig(pca_dim=pca_dim))
    reference = PaperCAT(9, pca_dim, 0.4).fit(q.numpy(), f.numpy())
    ids = reference.kmeans.predict(reference._features(fresh.numpy()))
    assert torch.equal((fresh @ clusters.weight + clusters.bias).argmax(dim=1), torch.from_numpy(ids).long())
    assert torch.equal(clusters.ids, torch.from_numpy(reference.kmeans.labels_).long())
    assert torch.equal(clusters.sizes, torch.bincount(clusters.ids, minlength=9))
    assert clusters.weight.shape == (classes, 9)


def test_fewer_distinct_images_than_clusters(caplog):
    q = torch.tensor([[0.1, 0.0], [3.0, 1.0], [0.0, 7.0]], dtype=torch.float64).repeat(10, 1)
    with caplog.at_level(logging.INFO, "cat_plugin"):
        clusters = fit_clusters(q, 6, CATConfig())
    assert sorted(clusters.sizes.tolist()) == [0, 0, 0, 10, 10, 10]
    assert torch.equal(torch.isinf(clusters.bias), clusters.sizes == 0)
    assert "distinct clusters" in caplog.text


def test_as_many_clusters_as_images():
    q, _ = paired_logits(60, 80)
    assert fit_clusters(q, 60, CATConfig()).sizes.tolist() == [1] * 60


def test_one_cluster_needs_no_clustering():
    clusters = fit_clusters(paired_logits(20, 5)[0], 1, CATConfig())
    assert clusters.sizes.tolist() == [20]
    assert not clusters.weight.any()
