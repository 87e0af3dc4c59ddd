import logging

import pytest
import torch

from cat_plugin import CATConfig, apply_cat
from cat_plugin.layers import recording
from cat_plugin.layers.recording import WARM_UP, Recorded, recorder_for
from tests.cat_plugin.layers.networks import pictures, planted
from tests.recorder import recorder


@pytest.fixture
def replays(monkeypatch):
    """Records as a GPU does; a list of all replays."""
    count = []
    monkeypatch.setattr(recording, "recorder_for", lambda device: recorder(count))
    return count


@pytest.mark.parametrize("options", [{}, {"augment": "flip"}], ids=["images", "views"])
def test_recorded_steps_fit_what_plain_ones_fit(options, replays, monkeypatch):
    config = CATConfig(layers="all")
    recorded = apply_cat(*planted(), pictures(100), config=config, **options)
    assert len(replays) > 200
    monkeypatch.undo()
    plain = apply_cat(*planted(), pictures(100), config=config, **options)
    assert list(recorded.layers) == list(plain.layers) != []
    for name, part in plain.layers.items():
        assert torch.equal(recorded.layers[name].scale, part.scale)
        assert torch.equal(recorded.layers[name].shift, part.shift)


def test_inputs_of_each_shape_have_a_record(replays):
    seen = []

    def function(given, x, y):
        seen.append(given)
        return x.sum() * 5 + y

    recorded = Recorded(function, torch.device("cpu"))
    for turn in range(6):
        for size in (2, 3):
            x, y = torch.full((size,), float(turn)), torch.tensor(10.0 * turn)
            assert recorded(size, x, y) == 5 * size * turn + 10 * turn
    assert len(seen) == 2 * (WARM_UP + 1)
    assert len(replays) == 2 * (6 - WARM_UP)


def test_what_cannot_be_recorded_is_called(replays, caplog):
    recorded = Recorded(lambda given, x: x * x.item(), torch.device("cpu"))
    with caplog.at_level(logging.INFO, logger="cat_plugin"):
        assert [recorded(None, torch.tensor(float(each))).item() for each in range(5)] == [0, 1, 4, 9, 16]
    assert not replays
    assert "cannot be recorded: operation not permitted" in caplog.text


def test_without_memory_for_a_record_steps_are_called_and_the_records_are_dropped(monkeypatch):
    count = []

    def recorder_of_one(device):
        def record(function):
            if len(made) == 1:
                raise torch.OutOfMemoryError("out of memory")
            made.append(1)
            return recorder(count)(function)

        made = []
        return record

    monkeypatch.setattr(recording, "recorder_for", recorder_of_one)
    recorded = Recorded(lambda given, x: x.sum(), torch.device("cpu"))
    for size in (2, 3, 2):
        for _ in range(5):
            assert recorded(None, torch.ones(size)) == size
    assert len(count) == 5 - WARM_UP and not recorded._records


def test_the_processor_does_not_record():
    assert recorder_for(torch.device("cpu")) is None
