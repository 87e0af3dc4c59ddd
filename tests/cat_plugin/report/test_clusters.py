import copy

import pytest
import torch

from cat_plugin import CATConfig, ClusterAffine, apply_cat
from cat_plugin.metrics import kl_divergence
from cat_plugin.report.clusters import CLASSES_KEPT, CLUSTERS_KEPT, profile_clusters
from tests.cat_plugin.helpers import images, model_pair


def by_sign():
    """Cluster 0 where the first of two logits is below zero, cluster 1 where it is above."""
    weight, bias = torch.tensor([[-1.0, 1.0], [0.0, 0.0]]), torch.zeros(2)
    return ClusterAffine(weight, bias, torch.ones(2, 2), torch.zeros(2, 2))


def test_table():
    """Centred logits are half the differences; over all images their mean square is 2.5 in `q` and 10 in `f`."""
    q = torch.tensor([[1.0, -1.0], [2.0, -2.0], [-2.0, 2.0], [9.0, 7.0]])
    larger, smaller = profile_clusters(by_sign(), q, 2 * q, q)
    assert (larger.cluster, larger.images, larger.classes) == (1, 3, (0, 1))
    assert (smaller.cluster, smaller.images) == (0, 1)
    mean = (1 + 2 + 1) / 3 / 2.5**0.5
    for values in (larger.fp, larger.quantized, larger.corrected):
        assert values == pytest.approx((mean, -mean))
    assert smaller.fp == pytest.approx((-2 / 2.5**0.5, 2 / 2.5**0.5))
    rows = torch.tensor([0, 1, 3])
    assert larger.kl_before == larger.kl_after == pytest.approx(kl_divergence(2 * q[rows], q[rows]))


def test_what_all_logits_have_in_common_and_their_scale_do_not_matter():
    generator = torch.Generator().manual_seed(0)
    q, f, out = torch.randn(3, 50, 2, generator=generator, dtype=torch.float64)
    plain = profile_clusters(by_sign(), q, f, out)
    moved = profile_clusters(by_sign(), q, 3 * f + torch.randn(50, 1, generator=generator), out - 7)
    for one, other in zip(plain, moved, strict=True):
        assert one.fp == pytest.approx(other.fp) and one.corrected == pytest.approx(other.corrected)


def test_the_largest_clusters_and_classes_are_kept():
    generator = torch.Generator().manual_seed(0)
    clusters, classes = CLUSTERS_KEPT + 3, CLASSES_KEPT + 5
    centres = 10 * torch.eye(classes)[:clusters]
    ids = torch.arange(clusters).repeat_interleave(torch.arange(clusters, 0, -1) * 3)
    q = centres[ids] + 0.1 * torch.randn(len(ids), classes, generator=generator)
    correction = ClusterAffine(centres.T, torch.zeros(clusters), *torch.ones(2, clusters, classes))
    found = profile_clusters(correction, q, q, q)
    assert [profile.cluster for profile in found] == list(range(CLUSTERS_KEPT))
    for profile in found:
        mean = q[ids == profile.cluster].mean(dim=0)
        assert profile.classes == tuple(sorted(mean.argsort(descending=True)[:CLASSES_KEPT].tolist()))
        assert len(profile.fp) == CLASSES_KEPT


@pytest.mark.parametrize("config", [CATConfig(num_clusters=4), CATConfig.paper(4)], ids=["auto", "paper"])
def test_a_report_profiles_the_clusters_of_its_correction(config):
    cat_model = apply_cat(*(model.eval() for model in model_pair()), images(600), config=config)
    report = cat_model.report
    assert sum(profile.images for profile in report.clusters) == 600
    assert sorted(profile.images for profile in report.clusters) == sorted(
        size for size in report.cluster_sizes if size
    )
    assert type(report).from_dict(report.to_dict()) == report
    before = sum(profile.images * profile.kl_before for profile in report.clusters) / 600
    after = sum(profile.images * profile.kl_after for profile in report.clusters) / 600
    assert (before, after) == pytest.approx((report.held_out.kl_before, report.held_out.kl_after), rel=1e-5)


def test_a_model_that_is_left_as_it_is_has_no_profile():
    _, fp = (model.eval() for model in model_pair())
    report = apply_cat(copy.deepcopy(fp), fp, images(200)).report
    assert not report.evidence.accepted and report.held_out is not None and report.clusters == ()
