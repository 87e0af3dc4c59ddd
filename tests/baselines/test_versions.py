import copy
import json

import pytest

from baselines import METHODS
from baselines.recipes import RECIPES
from baselines.versions import ENGINE_VERSION, result_version

from .figures import PATH, complaint, figures

STORED = json.loads(PATH.read_text("utf-8"))


@pytest.mark.parametrize("method", METHODS)
def test_results_change_only_with_their_version(method):
    assert complaint(method, STORED[method], figures(method)) is None


def scaled(figures):
    figures["tensors"]["fc.weight"][1] *= 1.01


def with_more_steps(figures):
    figures["published steps"][0] += 1


def without_a_tensor(figures):
    del figures["tensors"]["fc.weight"]


def of_another_version(figures):
    figures["version"] = "0.0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (scaled, "results changed; raise the version of the recipe 'qdrop'"),
        (with_more_steps, "results changed; raise the version"),
        (without_a_tensor, "results changed; raise the version"),
        (of_another_version, "those of version 0.0; run python -m tests.baselines.figures"),
    ],
)
def test_planted_changes_are_found(change, said):
    changed = copy.deepcopy(STORED["qdrop"])
    change(changed)
    assert said in complaint("qdrop", changed, STORED["qdrop"])
    assert complaint("qdrop", STORED["qdrop"], STORED["qdrop"]) is None


def test_version_is_that_of_engine_and_recipe():
    assert result_version("brecq") == f"{ENGINE_VERSION}.{RECIPES['brecq'].version}"
    with pytest.raises(ValueError, match="method='obq' should be one of rtn, adaround"):
        result_version("obq")
