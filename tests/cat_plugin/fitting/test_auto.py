import numpy as np
import pytest
import torch

from cat_plugin import CATConfig, ClusterAffine, fit_cluster_affine
from cat_plugin.fitting import auto as module
from cat_plugin.fitting import store
from cat_plugin.fitting.families import AFFINE, CLUSTERED, SHARED, Shared, fit_maps
from cat_plugin.fitting.store import LogitStore
from tests.cat_plugin.helpers import in_use, paired_logits
from tests.reference import lstsq_per_cluster

CONFIG = CATConfig(pca_dim=6, num_clusters=16)


def select(q, f, config):
    return module.select(LogitStore.of(q, f), config)


def agreement(out, f):
    return 100 * (out.argmax(1) == f.argmax(1)).double().mean().item()


def planted(n_images, n_classes, n_clusters, noise, strength=0.5, seed=0):
    """q, f, and the planted map of f from q's cluster; one class an image stands out in f."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    centers = 1.5 * draw(n_clusters, n_classes)
    scale, shift = 1 + 0.2 * strength * draw(n_clusters, n_classes).clamp(-2, 2), strength * draw(n_clusters, n_classes)

    def sample(images):
        winner = torch.randint(n_classes, (images,), generator=generator)
        ids = winner % n_clusters
        f = (centers[ids] + draw(images, n_classes)) * scale[ids] + shift[ids]
        f[torch.arange(images), winner] = f.max(dim=1).values + draw(images).abs() + 0.2
        q = (f - shift[ids]) / scale[ids] + noise * draw(images, n_classes)
        return q, f, q * scale[ids] + shift[ids]

    return sample(n_images), sample(2000)


@pytest.mark.parametrize(
    ("n_images", "n_classes"), [(600, 100), pytest.param(1024, 1000, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("n_clusters", [4, 16])
def test_planted_cluster_map_is_recovered(n_images, n_classes, n_clusters):
    (q, f, _), (fresh, target, perfect) = planted(n_images, n_classes, n_clusters, noise=0.1)
    gain = agreement(perfect, target) - agreement(fresh, target)
    assert gain > 5
    out = fit_cluster_affine(q, f, CATConfig(num_clusters=n_clusters))(fresh)
    assert agreement(out, target) - agreement(fresh, target) >= 0.8 * gain


@pytest.mark.parametrize("num_clusters", [1, 16])
@pytest.mark.parametrize("noise", [0.0, 0.1])
@pytest.mark.parametrize("seed", [0, 1])
def test_nothing_planted_gives_the_identity(noise, seed, num_clusters):
    (q, f, _), (fresh, _, _) = planted(600, 100, 4, noise, strength=0.0, seed=seed)
    selected = select(q, f, CATConfig(num_clusters=num_clusters))
    assert not selected.evidence.accepted
    assert "nothing to gain" in selected.evidence.reason
    assert torch.equal(selected.correction(fresh), fresh)
    assert torch.equal(selected.corrected, selected.q)


def test_correction_is_the_weighted_sum_of_the_maps():
    q, f = paired_logits(300, 12)
    selected = select(q, f, CONFIG)
    q, f = selected.q, selected.f
    shared = in_use(Shared.of(q, f, CONFIG))
    rows = shared.rows(q, f)
    weights = {candidate.name: candidate.weight for candidate in selected.evidence.candidates}
    maps = fit_maps(SHARED + CLUSTERED, shared, rows)
    assert [family.name for family in maps] == list(weights)
    expected = sum(weights[family.name] * affine_map(rows) for family, affine_map in maps.items())
    out = selected.correction(q)
    # The sum of the weights is a common scale of all logits, the share is what the report tells
    ratio = (out * expected).sum() / expected.square().sum()
    torch.testing.assert_close(out, ratio * expected)
    assert sum(weights.values()) == pytest.approx(1)
    assert min(weights.values()) >= 0


def test_order_of_the_images_does_not_matter():
    q, f = paired_logits(300, 12)
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = fit_cluster_affine(q, f, CONFIG), fit_cluster_affine(q[order], f[order], CONFIG)
    assert not torch.equal(first(q), q)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


def test_alpha_moves_part_of_the_way():
    """The correction, and what held-out images are judged by."""
    q, f = paired_logits(300, 12)
    made = [select(q, f, CATConfig(num_clusters=16, alpha=alpha)) for alpha in (1.0, 0.9, 0.0)]
    full, part, none = (selected.correction for selected in made)
    assert not torch.equal(full(q), q)
    torch.testing.assert_close(part(q), q + 0.9 * (full(q) - q))
    torch.testing.assert_close(none(q), q)
    full, part, none = (selected.corrected - selected.q for selected in made)
    torch.testing.assert_close(part, 0.9 * full)
    assert full.abs().max() > 1 and not none.any()


@pytest.mark.parametrize("num_clusters", [1, 4, 7])
def test_clusters_are_tried_where_they_are_asked_for(num_clusters):
    q, f = paired_logits(400, 12)
    selected = select(q, f, CATConfig(num_clusters=num_clusters))
    clustered = {candidate.name for candidate in selected.evidence.candidates if "clusters" in candidate.name}
    assert len(clustered) == (3 if num_clusters > 1 else 0)
    assert selected.evidence.accepted and selected.correction.num_clusters == num_clusters


@pytest.mark.parametrize("n_images", [1, 2, 19])
def test_too_few_images_leave_the_model_alone(n_images):
    q, f = paired_logits(n_images, 10)
    selected = select(q, f, CATConfig())
    assert torch.equal(selected.correction(q), q)
    assert f"{n_images} images are too few" in selected.evidence.reason


@pytest.mark.parametrize("classes", [1, 2])
def test_few_classes(classes):
    q, f = paired_logits(100, classes)
    correction = select(q, f, CATConfig()).correction
    assert isinstance(correction, ClusterAffine)
    assert torch.isfinite(correction(q)).all()


@pytest.mark.parametrize("constant", [0.0, 3.0])
def test_outputs_that_do_not_vary(constant):
    q = torch.full((100, 5), constant).double()
    assert torch.isfinite(fit_cluster_affine(q, paired_logits(100, 5)[1])(q)).all()


def test_logits_in_files_fit_as_those_in_memory(monkeypatch):
    """Least squares are those of all images, in memory and from files, though families are compared on a part."""
    (q, f, _), (fresh, target, _) = planted(900, 12, 4, noise=0.1)
    monkeypatch.setattr(module, "SELECTION_VALUES", 12 * 300)
    monkeypatch.setattr(store, "CHUNK_VALUES", 24 * 170)
    stores = [LogitStore(), LogitStore(memory_values=5000)]
    for one in stores:
        for start in range(0, 900, 64):
            one.append(q[start : start + 64].float(), f[start : start + 64].float())
    memory, files = (module.select(one, CONFIG) for one in stores)
    assert memory.evidence.images == len(memory.q) == 300
    assert memory.images == 900
    for a, b in zip(memory.correction.buffers(), files.correction.buffers(), strict=True):
        assert torch.equal(a, b)
    assert agreement(memory.correction(fresh), target) > agreement(fresh, target) + 3


@pytest.mark.parametrize("rows", [7, 170])
def test_size_of_the_chunks_does_not_matter(monkeypatch, rows):
    q, f = paired_logits(900, 12)
    monkeypatch.setattr(module, "SELECTION_VALUES", 12 * 300)
    whole = select(q, f, CONFIG)
    monkeypatch.setattr(store, "CHUNK_VALUES", 24 * rows)
    parts = select(q, f, CONFIG)
    assert whole.evidence.accepted and parts.evidence == whole.evidence
    for a, b in zip(whole.correction.buffers(), parts.correction.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_all_images_count_where_families_are_compared_on_a_part(monkeypatch):
    """If all weight is on one map, the correction is that map, as numpy fits it on all images."""
    q, f = paired_logits(900, 6)
    monkeypatch.setattr(module, "SELECTION_VALUES", 6 * 300)
    monkeypatch.setattr(
        module, "weigh", lambda outputs, sample: {family: float(family == AFFINE) for family in outputs}
    )
    monkeypatch.setattr(module, "temper", lambda weights, outputs, sample: weights)
    selected = select(q, f, CATConfig())
    slope, offset = lstsq_per_cluster(q.numpy(), f.numpy(), np.zeros(900, dtype=int), 1)
    torch.testing.assert_close(selected.correction.scale, torch.from_numpy(slope), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(selected.correction.shift, torch.from_numpy(offset), atol=1e-9, rtol=1e-9)
    assert len(selected.q) == 300


@pytest.mark.parametrize("copies", [2, 5])
def test_repeated_images_count_once(copies):
    """Copies of an image would be fitted and held out at a time."""
    (q, f, _), (fresh, _, _) = planted(128, 10, 4, noise=0.6)
    jitter = 1 + 1e-7 * torch.randn(copies * 128, 10, generator=torch.Generator().manual_seed(0)).double()
    once = select(q, f, CATConfig())
    many = select(q.repeat(copies, 1) * jitter, f.repeat(copies, 1), CATConfig())
    assert (once.repeated, many.repeated, many.images) == (0, (copies - 1) * 128, copies * 128)
    assert once.evidence.images == many.evidence.images == 128
    assert once.evidence.accepted
    torch.testing.assert_close(many.correction(fresh), once.correction(fresh), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_scale_of_the_logits(scale):
    (q, f, _), (fresh, target, _) = planted(600, 12, 4, noise=0.1)
    gain = agreement(fit_cluster_affine(q * scale, f * scale)(fresh * scale), target) - agreement(fresh, target)
    assert gain > 5


@pytest.mark.parametrize("n_images", [20, 40])
def test_any_number_of_clusters_may_be_asked_for(n_images):
    q, f = paired_logits(n_images, 10)
    assert torch.isfinite(fit_cluster_affine(q, f, CATConfig(num_clusters=64))(q)).all()


def test_logits_that_partly_agree_are_put_in_order():
    q, f = paired_logits(300, 8)
    q[:, :4], f[:, :4] = 1.0, 2.0
    order = torch.randperm(300, generator=torch.Generator().manual_seed(1))
    first, second = fit_cluster_affine(q, f, CONFIG), fit_cluster_affine(q[order], f[order], CONFIG)
    assert not torch.equal(first(q), q)
    for a, b in zip(first.buffers(), second.buffers(), strict=True):
        assert torch.equal(a, b)


def test_what_changes_no_prediction_is_left_alone():
    q, f = paired_logits(200, 6, noise=0.0)
    assert torch.equal(fit_cluster_affine(f + 0.3, f)(q.float()), q.float())


def test_gain_on_images_that_were_not_fitted_on():
    q, f = paired_logits(600, 8)
    out = fit_cluster_affine(q[:400], f[:400])(q[400:])
    assert agreement(out, f[400:]) > agreement(q[400:], f[400:]) + 1


def test_one_class_has_no_scale_to_find():
    f = torch.randn(200, 1, generator=torch.Generator().manual_seed(0))
    correction = select(f / 2, f, CATConfig()).correction
    assert correction(f).abs().max() <= 10 * f.abs().max()
