import numpy as np
import pytest
import torch

from cat_plugin import CATConfig
from cat_plugin.fitting.families import (
    CLUSTERED,
    IDENTITY,
    PRIOR,
    SHARED,
    SOFTENING,
    AffineMap,
    Basis,
    Rows,
    Shared,
    fit_maps,
)
from tests.cat_plugin.helpers import in_use, paired_logits
from tests.reference import naive_maps

EVERY = SHARED + CLUSTERED
CONFIG = CATConfig(pca_dim=4, num_clusters=5)


def fitted(rows, shared, chunk_sizes=None, sample=None):
    """The maps of all families; least squares from chunks of these sizes, if given."""

    def chunks():
        return (Rows(*parts) for parts in zip(*(part.split(chunk_sizes) for part in rows), strict=True))

    sample = rows if sample is None else rows.take(sample)
    return fit_maps(EVERY, shared, sample, None if chunk_sizes is None else chunks)


@pytest.fixture(scope="module")
def data():
    """900 rows of 6 classes that bring a map of every kind, with what families share, made of the first 300."""
    q, f = paired_logits(900, 6)
    generator = torch.Generator().manual_seed(4)
    f = f + 0.4 * q.roll(1, dims=1) + 0.3 * torch.randn(900, 6, generator=generator, dtype=torch.float64)
    return q, f, {share: in_use(Shared.of(q[:300], f[:300], CONFIG, share)) for share in (1.0, 0.5)}


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("part", [300, 900])
def test_every_family_equals_its_naive_fit(data, share, part):
    """Squared errors are those of all rows, divergences those of a part in memory, whichever is larger."""
    q, f, shared = data[0], data[1], data[2][share]
    rows, sample = shared.rows(q, f), torch.arange(part)
    arrays = [values.numpy() for values in rows]
    expected = naive_maps(*arrays, 5, shared.temperature, PRIOR, share, slice(part))
    maps = fitted(rows, shared, 250, sample)
    assert [family.name for family in maps] == [family.name for family in EVERY]
    assert {family.name for family in maps} == expected.keys()
    for family, found in maps.items():
        scale, shift, mix = (torch.from_numpy(values) for values in expected[family.name])
        tolerance = 2e-4 if "KL" in family.name else 1e-9
        reference = q * scale[rows.ids % len(scale)] + shift[rows.ids % len(shift)] + rows.z @ mix
        torch.testing.assert_close(found(rows), reference, atol=tolerance, rtol=0, msg=lambda m, n=family.name: n + m)
        if family != IDENTITY:
            assert (found(rows) - q).abs().mean() > 0.05


@pytest.mark.parametrize("sizes", [300, 7, [1, 2, 297]], ids=str)
def test_size_of_the_chunks_does_not_matter(data, sizes):
    q, f, shared = data[0][:300], data[1][:300], data[2][1.0]
    rows = shared.rows(q, f)
    whole, parts = fitted(rows, shared), fitted(rows, shared, sizes)
    for family, expected in whole.items():
        for name in ("scale", "shift", "mix"):
            found = getattr(parts[family], name)
            torch.testing.assert_close(found, getattr(expected, name), atol=1e-9, rtol=1e-9, msg=family.name)


def test_each_family_equals_its_module(data):
    """The map in terms of whitened components, and the module in terms of logits, are the same function."""
    q, f, shared = data[0], data[1], data[2][1.0]
    rows = shared.rows(q, f)
    for family, affine_map in fitted(rows, shared).items():
        correction = shared.correction(affine_map, alpha=1.0)
        assert correction.num_clusters == (5 if family.clustered else 1)
        torch.testing.assert_close(correction(q), affine_map(rows), msg=family.name)
        half = shared.correction(affine_map, alpha=0.5)
        torch.testing.assert_close(half(q), q + 0.5 * (correction(q) - q), msg=family.name)
        assert (correction.mix is None) == (family in SHARED[:2] + SHARED[3:4] + CLUSTERED[::2]), family.name


def lineage(family):
    return {family} if family.base is None else {family} | lineage(family.base)


def test_only_wanted_families_are_fitted_alike(data):
    q, f, shared = data[0][:300], data[1][:300], data[2][1.0]
    rows = shared.rows(q, f)
    everything = fitted(rows, shared)
    for family, affine_map in everything.items():
        alone = fit_maps([family], shared, rows)
        assert alone.keys() == lineage(family)
        torch.testing.assert_close(alone[family].shift, affine_map.shift)


def test_sum_of_maps_gives_the_sum_of_their_outputs(data):
    q, f, shared = data[0][:300], data[1][:300], data[2][1.0]
    rows = shared.rows(q, f)
    maps = fitted(rows, shared).values()
    parts = [(0.1 * place, affine_map) for place, affine_map in enumerate(maps)]
    expected = sum(weight * affine_map(rows) for weight, affine_map in parts)
    torch.testing.assert_close(AffineMap.combined(parts)(rows), expected)


def test_clusters_are_tried_where_there_are_some():
    q, f = paired_logits(600, 6)

    def tried(rows, **settings):
        return [len(clusters.bias) for clusters in Shared.of(q[:rows], f[:rows], CATConfig(**settings)).tried]

    assert (tried(600), tried(511), tried(63)) == ([4, 32], [4], [])
    assert (tried(100, num_clusters=7), tried(10, num_clusters=7), tried(100, num_clusters=1)) == ([7], [5], [])
    constant = torch.ones(100, 6, dtype=torch.float64)
    assert Shared.of(constant, f[:100], CATConfig()).tried == ()


def test_clusters_are_those_of_the_nearest_centroid():
    q, f = paired_logits(400, 6)
    shared = in_use(Shared.of(q, f, CONFIG))
    ids = shared.rows(q, f).ids
    assert torch.equal(ids, shared.clusters.ids)
    features = (q - shared.basis.mean) @ (shared.basis.directions / shared.basis.directions.norm(dim=0))
    means = torch.stack([features[ids == k].mean(dim=0) for k in range(5)])
    assert torch.equal(torch.cdist(features, means).argmin(dim=1), ids)
    assert ids.unique().tolist() == [0, 1, 2, 3, 4]


def test_temperature_is_half_the_spread_over_classes():
    q, f = paired_logits(50, 6)
    expected = SOFTENING * np.mean([np.std(row, ddof=1) for row in f.numpy()])
    assert Shared.of(q, f, CONFIG).temperature == pytest.approx(expected)
    assert Shared.of(q, 10 * f, CONFIG).temperature == pytest.approx(10 * expected)
    assert Shared.of(q[:, :1], f[:, :1], CONFIG).temperature == pytest.approx(
        SOFTENING * np.std(f[:, 0].numpy(), ddof=1)
    )


def test_components_are_whitened_and_few():
    q, f = paired_logits(200, 8)
    q[:, 7] = q[:, 0]
    z = Basis.fit(q, 50, seed=0)(q)
    assert z.shape == (200, 7), "what does not vary says nothing"
    torch.testing.assert_close(z.T @ z / 199, torch.eye(7, dtype=torch.float64))
    torch.testing.assert_close(z.mean(dim=0), torch.zeros(7, dtype=torch.float64))
    assert Basis.fit(q, 3, seed=0)(q).shape == (200, 3)
    assert Shared.of(q[:24], f[:24], CATConfig()).rows(q, f).z.shape == (200, 24 // 5)
    assert Shared.of(q[:40], f[:40], CATConfig(), share=0.5).rows(q, f).z.shape == (200, 40 // 2 // 5)
    assert Basis.fit(torch.ones(9, 8, dtype=torch.float64), 3, seed=0)(q).shape == (200, 0)
