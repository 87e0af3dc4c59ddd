"""What the tests of the engine share."""

import pytest

from baselines import api
from baselines.recipes import Recipe

from ..networks import SmallResNet, images, randomized


@pytest.fixture
def run(monkeypatch):
    """Quantize the small network with any recipe."""

    def run(recipe: Recipe, iters=30, seed=0, bits=2, inputs=None, model=None):
        monkeypatch.setattr(api, "RECIPES", {"custom": recipe})
        model = randomized(SmallResNet()) if model is None else model
        inputs = images(40) if inputs is None else inputs
        return api.quantize(
            model, inputs, method="custom", w_bits=bits, a_bits=bits, iters=iters, batch_size=16, seed=seed
        )

    return run
