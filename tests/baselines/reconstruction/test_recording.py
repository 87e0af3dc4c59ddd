import logging

import pytest
import torch

from baselines.recipes import RECIPES
from baselines.reconstruction import recording, unit_run
from baselines.reconstruction.recording import WARM_UP, Repeated, recorder_for
from baselines.reconstruction.unit_run import UnitData, UnitRun
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
    units, real = [], UnitRun._steps_on_device

    def counted(self, *args):
        units.append(self.unit.name)
        return real(self, *args)

    monkeypatch.setattr(UnitRun, "_steps_on_device", counted)
    recorded = run(RECIPES[method], iters=40)
    assert len(units) >= 4 and len(replays) == len(units) * (40 - 1 - WARM_UP)  # the first step is by itself
    monkeypatch.setattr(recording, "recorder_for", lambda device: None)
    assert same(recorded, run(RECIPES[method], iters=40))


@pytest.mark.parametrize("kept_away", [True, False], ids=["data elsewhere", "few steps"])
def test_whether_steps_are_recorded_does_not_change_what_is_learned(run, replays, monkeypatch, kept_away):
    """As where calibration data are kept on the CPU to save memory."""
    recorded = run(RECIPES["qdrop"], iters=40)
    replays.clear()
    if kept_away:
        monkeypatch.setattr(UnitData, "stays_on_device", False)
    else:
        monkeypatch.setattr(unit_run, "FEWEST_RECORDED", 41)
    assert same(recorded, run(RECIPES["qdrop"], iters=40)) and not replays


def test_annealed_steps_are_those_of_devices_that_do_not_record(run, replays, monkeypatch):
    """AdaRound draws nothing but the images of a step, so that both come to the same."""
    recorded = run(RECIPES["adaround"], iters=40)
    assert replays
    monkeypatch.undo()
    assert same(recorded, run(RECIPES["adaround"], iters=40))


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
