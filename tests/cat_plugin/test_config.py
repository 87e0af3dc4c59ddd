import json

import pytest

from cat_plugin import CATConfig, CATError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_clusters", 0, "num_clusters=0 should be an integer >= 1"),
        ("num_clusters", 2.0, "num_clusters=2.0 should be an integer >= 1"),
        ("num_clusters", True, "num_clusters=True should be an integer >= 1"),
        ("pca_dim", -3, "pca_dim=-3 should be an integer >= 1"),
        ("seed", -1, "seed=-1 should be an integer from 0 to 4294967295"),
        ("seed", 2**32, "seed=4294967296 should be an integer from 0"),
        ("alpha", -0.1, "alpha=-0.1 should be a number from 0"),
        ("alpha", 1.5, "alpha=1.5 should be a number from 0"),
        ("alpha", float("nan"), "alpha=nan should be a number from 0"),
        ("alpha", "half", "alpha='half' should be a number from 0"),
        ("mode", "best", "mode='best' should be one of 'auto', 'paper'"),
        ("output_kind", None, "output_kind=None should be one of 'auto', 'softmax', 'sigmoid', 'value'"),
    ],
)
def test_invalid_value_is_named(field, value, message):
    with pytest.raises(CATError, match=f"^{message}"):
        CATConfig(**{field: value})


@pytest.mark.parametrize(("n_images", "expected"), [(1, ()), (63, ()), (64, (4,)), (511, (4,)), (512, (4, 32))])
def test_default_tries_clusters_of_sixteen_images(n_images, expected):
    assert CATConfig().clusters_for(n_images) == expected


@pytest.mark.parametrize(("n_images", "expected"), [(1, 1), (2, 1), (9, 4), (9999, 64)])
def test_clusters_that_were_asked_for_have_two_images(n_images, expected):
    assert CATConfig(num_clusters=64).clusters_for(n_images) == (expected,)


def test_paper_does_not_cap():
    assert CATConfig.paper().clusters_for(64) == (64,)
    with pytest.raises(CATError, match="n_images=3 should be >= num_clusters=64; lower num_clusters or give more"):
        CATConfig.paper().clusters_for(3)


def test_dict_round_trip_through_json():
    config = CATConfig.paper(num_clusters=8, alpha=1, seed=3)
    assert CATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(CATError, match=r"unknown CATConfig fields \['clusters'\]"):
        CATConfig.from_dict({"clusters": 3})


@pytest.mark.parametrize("name", ["features", "criterion", "min_cluster_size"])
def test_settings_of_earlier_versions_are_unknown(name):
    with pytest.raises(CATError, match=rf"unknown CATConfig fields \['{name}'\]"):
        CATConfig.from_dict({name: None})


def test_is_a_frozen_value():
    with pytest.raises(AttributeError):
        CATConfig().alpha = 0.5
    assert hash(CATConfig()) == hash(CATConfig())
