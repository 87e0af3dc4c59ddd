"""Which fits stand for which values."""

from dataclasses import asdict

import pytest

from benchmarks.measure.factors import FACTORS, OF_OUTPUT, points, unique_cells
from benchmarks.measure.paired_logits import Source
from benchmarks.networks.layer_fits import Variation
from cat_plugin import CATConfig
from cat_plugin.layers.fit import Recipe

PAPER, DEFAULT = CATConfig.paper(), CATConfig(layers="none")


def source(name="a", fresh=300, **more):
    return Source(name=name, digest="0123456789abcdef", fresh=fresh, load=None, **more)


def found(factor, values, sources=None, n_cat=100, max_draws=1):
    return points(sources or [source()], {factor: values}, n_cat, max_draws)


def differences(cell):
    """What a fit changes of the centre."""
    centre = asdict(PAPER if cell.mode == "cat_paper" else DEFAULT)
    changed = {name: value for name, value in asdict(cell.config).items() if value != centre[name]}
    return changed | ({} if cell.images == 100 else {"images": cell.images})


@pytest.mark.parametrize(
    ("factor", "field", "values"),
    [
        ("clusters", "num_clusters", (1, 8)),
        ("alpha", "alpha", (0.25, 0.5)),
        ("pca-dim", "pca_dim", (3, 5)),
        ("images", "images", (64, 128)),
        ("seed", "seed", (1, 2)),
    ],
)
def test_one_setting_changes_and_nothing_else(factor, field, values):
    grid = [(point.value, point.cell.mode, differences(point.cell)) for point in found(factor, values)]
    assert grid == [(value, mode, {field: value}) for value in values for mode in ("cat_paper", "output")]


def test_value_of_the_centre_is_the_centre():
    for point in (*found("alpha", (0.4,)), *found("clusters", (64,)), *found("images", (100,))):
        # Paper mode's; the default has another alpha, and chooses among several numbers of clusters.
        others = {"alpha": {"alpha": 0.4}, "clusters": {"num_clusters": 64}, "images": {}}
        assert differences(point.cell) == ({} if point.cell.mode == "cat_paper" else others[point.factor])


@pytest.mark.parametrize(
    ("factor", "expected"),
    {
        "layers-rate": {"chosen": {}, "near": {"recipe": Recipe(rates=("near",))}},
        "layers-epochs": {1.0: {}, 2.0: {"recipe": Recipe(steps=2.0)}},
        "layers-which": {"all": {}, "convolutions": {"which": "convolutions"}},
        "layers-parts": {
            "both": {},
            "scales": {"recipe": Recipe(offsets=False)},
            "offsets": {"recipe": Recipe(scales=False)},
        },
        "layers-views": {"none": {}, "flipped": {"views": "flipped"}},
        "layers-way": {"together": {}, "closed form": {"closed_form": True}},
    }.items(),
    ids=str,
)
def test_of_layers_one_setting_of_the_default_changes(factor, expected):
    grid = {point.value: point.cell for point in found(factor, tuple(expected))}
    assert {value: cell.variation for value, cell in grid.items()} == {
        value: Variation(**changed) for value, changed in expected.items()
    }
    assert all((cell.mode, cell.images, cell.config) == ("layers", 100, CATConfig()) for cell in grid.values())
    assert len({cell.name for cell in grid.values()}) == len(expected)


def test_fewer_images_for_the_layers():
    assert [point.cell.images for point in found("layers-images", (64, 128, 512))] == [64, 128]


def test_paper_mode_needs_as_many_images_as_clusters():
    assert [point.cell.mode for point in found("clusters", (101,))] == ["output"]
    assert [point.cell.mode for point in found("images", (63,))] == ["output"]


def test_images_of_the_quantization_are_as_many_as_fresh_ones():
    cells = [point.cell for point in found("origin", ("fresh", "tuned"), [source(tuned=80)])]
    grid = [(cell.origin, cell.images, cell.draw, cell.mode) for cell in cells]
    assert grid == [(origin, 80, 0, mode) for origin in ("fresh", "tuned") for mode in ("cat_paper", "output")]
    assert not found("origin", ("fresh", "tuned"), [source(tuned=0)])


def test_draws_are_disjoint_and_of_every_source():
    grid = found("images", (64, 150), [source("a", 300), source("b", 140)], max_draws=3)
    counts = {}
    for point in grid:
        counts.setdefault((point.cell.source.name, point.value, point.cell.mode), []).append(point.cell.rows.start)
    assert counts == {
        **{("a", 64, mode): [0, 64, 128] for mode in ("cat_paper", "output")},
        **{("a", 150, mode): [0, 150] for mode in ("cat_paper", "output")},
        **{("b", 64, mode): [0, 64] for mode in ("cat_paper", "output")},
    }


def test_fits_that_stand_for_several_values_are_made_once():
    every = {name: factor.values for name, factor in FACTORS.items()}
    grid = points([source(fresh=9000, tuned=1024)], every, 1024, 1)
    cells = unique_cells(grid)
    assert len({cell.name for cell in cells}) == len(cells) < len(grid)
    centre = [
        point.factor
        for point in grid
        if point.cell.mode == "output" and not differences(point.cell).keys() - {"images"}
    ]
    assert set(OF_OUTPUT) - {"clusters"} == set(centre)
    assert {"clusters", "alpha", "pca-dim", "images", "origin"} <= set(FACTORS)
