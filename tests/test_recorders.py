"""What the recorders of both packages, which may not import each other, have to do alike."""

import warnings

import pytest
import torch

from baselines.reconstruction import recording as iterations
from cat_plugin.layers import recording as steps


@pytest.mark.parametrize("recording", [iterations, steps], ids=lambda module: module.__name__)
def test_readings_are_refused_without_a_word_of_how(recording, monkeypatch):
    """The mode of devices that refuses readings warns that it is new."""
    mode = ["default"]

    class Module:
        get_sync_debug_mode = staticmethod(lambda: mode[0])

        @staticmethod
        def set_sync_debug_mode(value):
            warnings.warn("a prototype feature", UserWarning, stacklevel=1)
            mode[0] = value

    monkeypatch.setattr(recording, "_module", lambda device: Module)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with recording._no_reading(torch.device("meta")):
            assert mode == ["error"] and said == []
    assert mode == ["default"]
