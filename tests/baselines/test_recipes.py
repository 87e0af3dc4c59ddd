import ast
from dataclasses import replace
from pathlib import Path

import pytest

import baselines
from baselines.recipes import QDROP, RECIPES, Prediction

ENGINE = sorted(set(Path(baselines.__file__).parent.rglob("*.py")) - {Path(baselines.__file__).with_name("recipes.py")})


@pytest.mark.parametrize("path", ENGINE, ids=lambda path: path.stem)
def test_only_recipes_and_the_default_know_the_name_of_a_method(path):
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    words = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    words += [node.id for node in nodes if isinstance(node, ast.Name)]
    words += [node.attr for node in nodes if isinstance(node, ast.Attribute)]
    assert {word.lower() for word in words} & set(RECIPES) == ({"qdrop"} if path.stem == "api" else set())


@pytest.mark.parametrize(
    ("iters", "expected"),
    [(20_000, 1e-3), (40_000, 1e-3), (5_000, 4e-3), (10, 0.1)],
    ids=["published", "longer", "shorter", "capped"],
)
def test_shorter_runs_take_the_roundings_as_far(iters, expected):
    assert QDROP.stages[0].rounding_lr_for(iters) == pytest.approx(expected)


@pytest.mark.parametrize(("classes", "expected"), [(1000, 10.0), (5000, 10.0), (10, 2.4345), (1, 1.2593)])
def test_fewer_classes_weigh_less(classes, expected):
    prediction = Prediction(weight=10.0, classes=1000, temperature=4.0)
    assert prediction.weight_for(classes) == pytest.approx(expected, rel=1e-4)
    assert replace(prediction, classes=None).weight_for(classes) == 10.0
