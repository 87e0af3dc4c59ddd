"""The command line, end to end on a few small draws."""

import csv

import pytest

from benchmarks.commands.nulls import main
from benchmarks.measure import leak_guard
from benchmarks.measure.nulls import CASES, LogitsCase


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two cases of two classes."""
    cases = {
        "positions": LogitsCase(name="positions", images=(20, 25), positions=3, classes=2),
        "plain": LogitsCase(name="plain", images=(30,), classes=2),
    }
    for name, case in cases.items():
        monkeypatch.setitem(CASES, name, case)
    results = ["--results", str(tmp_path / "results"), "--cache", str(tmp_path / "cache"), "--no-progress"]
    return [*results, "--draws", "2"]


@pytest.fixture
def fits(monkeypatch):
    """Numbers of rows of every fit."""
    seen, real = [], leak_guard.fit_and_score

    def spy(store, config):
        seen.append(len(store))
        return real(store, config)

    monkeypatch.setattr(leak_guard, "fit_and_score", spy)
    return seen


def folder(tmp_path, name="results"):
    (found,) = (tmp_path / name).iterdir()
    return found


def test_every_case_size_and_draw_has_a_line(options, tmp_path, fits, capsys):
    assert main(options) == 0
    run = folder(tmp_path)
    assert run.name.startswith("nulls-positions-plain-")
    lines = list(csv.DictReader((run / "results.csv").open()))
    grid = [(line["case"], int(line["images"]), int(line["draw"])) for line in lines]
    sizes = [("positions", 20), ("positions", 25), ("plain", 30)]
    assert grid == [(*size, draw) for size in sizes for draw in (0, 1)]
    assert fits == [60, 60, 75, 75, 30, 30]
    assert (run / "results.md").read_text().strip() in capsys.readouterr().out


def test_stopped_run_resumes_with_the_same_table(options, tmp_path, monkeypatch, fits, capsys):
    assert main([*options, "--results", str(tmp_path / "whole"), "--cache", str(tmp_path / "other")]) == 0
    calls, real = [], leak_guard.fit_and_score

    def killed_at_fourth(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(leak_guard, "fit_and_score", killed_at_fourth)
    assert main(options) == 130
    assert "the same command resumes" in capsys.readouterr().err
    assert main(options) == 0
    assert "3 of 6 rows are finished already" in capsys.readouterr().out
    assert len(calls) == 4 + 3
    for name in ("results.csv", "results.md"):
        assert (folder(tmp_path) / name).read_text() == (folder(tmp_path, "whole") / name).read_text()


def test_more_draws_measure_only_what_is_new(options, tmp_path, fits):
    assert main([*options, "--cases", "plain"]) == 0
    assert main([*options, "--cases", "plain", "--draws", "3"]) == 0
    assert len(fits) == 3
    assert main([*options, "--cases", "plain", "--seed", "1"]) == 0
    assert len(fits) == 5


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cases", "gain"], "invalid choice: 'gain'"),
        (["--draws", "0"], "'0' should be a whole number of at least 1"),
        (["--seed", "-1"], "should be a whole number from 0"),
    ],
)
def test_wrong_options_end_with_code_2(options, more, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*options, *more])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_several_processes_are_refused(options, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(options) == 2
    assert capsys.readouterr().err.startswith("error: nulls ")
