import json

import pytest
from cat_plugin.fitting.criteria import CRITERIA

from cat_plugin import CATConfig, CATError


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_clusters", 0, "num_clusters=0 should be an integer >= 1"),
        ("num_clusters", 2.0, "num_clusters=2.0 should be an integer >= 1"),
        ("num_clusters", True, "num_clusters=True should be an integer >= 1"),
        ("pca_dim", -3, "pca_dim=-3 should be an integer >= 1"),
        ("min_cluster_size", 0, "min_cluster_size=0 should be an integer >= 1"),
        ("seed", -1, "seed=-1 should be an integer from 0 to 4294967295"),
        ("seed", 2**32, "seed=4294967296 should be an integer from 0"),
        ("alpha", -0.1, "alpha=-0.1 should be a number from 0"),
        ("alpha", 1.5, "alpha=1.5 should be a number from 0"),
        ("alpha", float("nan"), "alpha=nan should be a number from 0"),
        ("alpha", "half", "alpha='half' should be a number from 0"),
        (
            "criterion",
            "top1",
            "criterion='top1' should be one of 'softened_kl', 'kl', 'squared_error', 'agreement', 'n",
        ),
        ("criterion", None, "criterion=None should be one of"),
        ("criterion", ["kl"], r"criterion=\['kl'\] should be one of"),
    ],
)
def test_invalid_value_is_named(field, value, message):
    with pytest.raises(CATError, match=f"^{message}"):
        CATConfig(**{field: value})


@pytest.mark.parametrize(
    ("n_images", "expected"), [(1, 1), (15, 1), (16, 1), (32, 2), (1023, 63), (1024, 64), (9999, 64)]
)
def test_default_caps_clusters_by_images(n_images, expected):
    assert CATConfig().clusters_for(n_images) == expected


def test_paper_does_not_cap():
    assert CATConfig.paper().clusters_for(64) == 64
    with pytest.raises(CATError, match="n_images=3 should be >= num_clusters=64; lower num_clusters or give more"):
        CATConfig.paper().clusters_for(3)


def test_dict_round_trip_through_json():
    config = CATConfig.paper(num_clusters=8, alpha=1, seed=3)
    assert CATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(CATError, match=r"unknown CATConfig fields \['clusters'\]"):
        CATConfig.from_dict({"clusters": 3})


def test_criterion_is_no_setting_of_paper_mode():
    with pytest.raises(CATError, match=r"^criterion='kl' with mode='paper': expected mode='auto'"):
        CATConfig(mode="paper", criterion="kl")
    assert CATConfig(mode="paper", criterion="softened_kl") == CATConfig(mode="paper")


@pytest.mark.parametrize("criterion", CRITERIA)
def test_criterion_goes_through_json_and_may_be_absent(criterion):
    config = CATConfig(criterion=criterion)
    values = json.loads(json.dumps(config.to_dict()))
    assert values.pop("criterion") == criterion
    assert CATConfig.from_dict(values) == CATConfig()
    assert CATConfig.from_dict(values | {"criterion": criterion}) == config


def test_is_a_frozen_value():
    with pytest.raises(AttributeError):
        CATConfig().alpha = 0.5
    assert hash(CATConfig()) == hash(CATConfig())
