"""What holds for every test."""

import pytest

from cat_plugin.layers.descent import RATES


@pytest.fixture(autouse=True)
def private_cache(tmp_path, monkeypatch):
    """Nothing is read from or written to the cache of whoever runs the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg-cache"))


@pytest.fixture(autouse=True)
def short_fits_of_layers(request, monkeypatch):
    """What is not about layers need not wait for good corrections of them."""
    if "layer" not in request.node.nodeid and "readme" not in request.node.nodeid:
        monkeypatch.setattr("cat_plugin.layers.fit.STEPS", dict.fromkeys(RATES, 10))
