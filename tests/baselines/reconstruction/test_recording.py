import logging

import pytest
import torch

from baselines.recipes import RECIPES
from baselines.reconstruction import recording, unit_run
from baselines.reconstruction.recording import WARM_UP, Repeated, recorder_for
from tests.recorder import recorder

from ..networks import same


@pytest.fixture
def replays(monkeypatch):
    """Records as a GPU does; a list of all replays."""
    count = []
    for module in (recording, unit_run):
        monkeypatch.setattr(module, "recorder_for", lambda device: recorder(count))
    return count


@pytest.mark.parametrize("method", ["adaround", "brecq", "qdrop", "pd_quant"])
def test_recorded_iterations_learn_what_plain_ones_learn(run, method, replays, monkeypatch):
    recorded = run(RECIPES[method], iters=40)
    assert len(replays) > 0.9 * 40
    # Plain ones on the same random numbers: batches first, as the recorded ones have them.
    monkeypatch.setattr(recording, "recorder_for", lambda device: None)
    plain = run(RECIPES[method], iters=40)
    assert same(recorded, plain)


def test_function_is_called_then_recorded_and_replayed(replays):
    x, seen = torch.zeros(()), []

    def work():
        seen.append(1)
        x.add_(1)

    again = Repeated(work, torch.device("cpu"), torch.Generator())
    for _ in range(10):
        again()
    assert x == 10
    assert len(seen) == WARM_UP + 1
    assert len(replays) == 10 - WARM_UP


def test_what_cannot_be_recorded_is_called(replays, caplog):
    x = torch.zeros(())

    def work():
        x.add_(1 if x.item() < 100 else 0)

    again = Repeated(work, torch.device("cpu"), torch.Generator())
    with caplog.at_level(logging.INFO, logger="baselines"):
        for _ in range(10):
            again()
    assert x == 10
    assert not replays
    assert "cannot be recorded: operation not permitted" in caplog.text


def test_the_processor_does_not_record():
    assert recorder_for(torch.device("cpu")) is None
