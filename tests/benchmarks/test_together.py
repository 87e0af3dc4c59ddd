"""Several processes that share the rows of a run."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from benchmarks.commands import ablate, compare, robustness
from benchmarks.measure.accuracy import Measurement
from benchmarks.measure.protocol import Setting
from benchmarks.runs import resume
from benchmarks.runs.environment import ROOT
from benchmarks.runs.processes import Process, claimed
from benchmarks.runs.resume import Rows
from tests.benchmarks.rows import all_same, make_measurement
from tests.benchmarks.test_resume import tables

GRID = [Setting("rtn", 2, 2, seed) for seed in range(6)]


def measure(setting):
    return make_measurement(setting, won=10 + setting.seed)


EXPECTED = [measure(setting) for setting in GRID]


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(resume, "PAUSE", 0.01)


def together(folder, rank, world, work=measure, grid=GRID):
    return Rows(folder, Measurement).complete_together(grid, work, Process(rank=rank, world=world))


def test_alone_it_is_an_ordinary_run(tmp_path):
    assert all_same(together(tmp_path, 0, 1), EXPECTED)


@pytest.mark.parametrize("world", [2, 3, 8])
def test_every_row_is_measured_once_and_the_first_process_has_all(tmp_path, world):
    barrier, seen = threading.Barrier(world), []

    def process(rank):
        def work(setting):
            seen.append(setting.seed)
            return measure(setting)

        barrier.wait(timeout=20)
        return together(tmp_path, rank, world, work)

    with ThreadPoolExecutor(world) as threads:
        first, *others = threads.map(process, range(world))
    assert all_same(first, EXPECTED) and others == [None] * (world - 1)
    assert sorted(seen) == list(range(6))
    assert not list(tmp_path.glob(".*.lock"))


def test_processes_start_with_different_rows(tmp_path):
    for rank in range(3):
        order = []
        together(
            tmp_path / str(rank),
            rank,
            3,
            lambda setting, order=order: (order.append(setting.seed), measure(setting))[1],
        )
        assert order[:2] == [rank, rank + 3] and sorted(order) == list(range(6))


def test_first_process_measures_what_a_dead_one_has_left(tmp_path):
    """The second one never starts."""
    assert all_same(together(tmp_path, 0, 2), EXPECTED)


def test_first_process_waits_for_a_claimed_row_and_takes_it_when_the_claim_ends(tmp_path):
    released = threading.Event()

    def hold():
        with claimed(tmp_path / f".{GRID[3].name}.lock") as free:
            assert free
            started.set()
            released.wait(20)

    started, measured = threading.Event(), []

    def work(setting):
        measured.append(setting.seed)
        if len(measured) == 5:
            threading.Timer(0.2, released.set).start()
        return measure(setting)

    holder = threading.Thread(target=hold)
    holder.start()
    started.wait(20)
    assert all_same(together(tmp_path, 0, 2, work), EXPECTED)
    holder.join()
    assert measured[-1] == 3 and sorted(measured) == list(range(6))


def test_other_processes_do_not_wait(tmp_path):
    with claimed(tmp_path / f".{GRID[0].name}.lock"):
        assert together(tmp_path, 1, 2) is None
    assert sorted(Rows(tmp_path, Measurement).finished([each.name for each in GRID])) == [
        each.name for each in GRID[1:]
    ]


def test_row_that_fails_stops_its_process_and_is_free_again(tmp_path):
    def fail(setting):
        raise KeyError(setting.name)

    with pytest.raises(KeyError):
        together(tmp_path, 1, 2, fail)
    assert all_same(together(tmp_path, 0, 2), EXPECTED)


def test_unreadable_row_is_measured_again(tmp_path):
    together(tmp_path, 0, 2)
    (tmp_path / f"{GRID[2].name}.json").write_text("{")
    again = []
    together(tmp_path, 1, 2, lambda setting: (again.append(setting), measure(setting))[1])
    assert again == [GRID[2]]


@pytest.fixture
def second(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


def test_second_process_prints_nothing_and_writes_no_report(tiny, tmp_path, monkeypatch, second, capsys):
    monkeypatch.setattr(compare, "measure", lambda setting, *args, **kwargs: make_measurement(setting))
    assert compare.main([*tiny, "--seeds", "0", "1"]) == 0
    (folder,) = (tmp_path / "results").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["rows", "settings.json"]
    assert len(list((folder / "rows").glob("*.json"))) == 2
    printed = capsys.readouterr()
    assert not printed.out and not printed.err
    assert compare.main([*tiny, "--n-calib", "7"]) == 2
    assert capsys.readouterr().err.startswith("error: --n-calib 7 is less than one batch")


def test_folder_is_not_emptied_by_several(tiny, second, capsys):
    assert compare.main([*tiny, "--fresh"]) == 2
    assert "--fresh is for one process, got WORLD_SIZE=2; delete the folder instead" in capsys.readouterr().err


def test_several_do_not_download_cifar10_at_once(tiny, second, tmp_path, monkeypatch, capsys):
    options = [option for option in tiny if option not in ("--data", tiny[tiny.index("--data") + 1])]
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", None)
    assert compare.main([*options, "--cache", str(tmp_path / "cache")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path / 'cache' / 'cifar10'} holds no CIFAR-10, and several processes cannot")


@pytest.mark.parametrize("command", [ablate, robustness])
def test_other_commands_run_alone(command, second, capsys, tmp_path):
    assert command.main(["--results", str(tmp_path), "--cache", str(tmp_path)]) == 2
    assert "runs in one process, got WORLD_SIZE=2; torchrun is for compare" in capsys.readouterr().err


def test_variables_of_another_launcher_are_an_error_of_the_user(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "x")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert compare.main([]) == 2
    assert capsys.readouterr().err.startswith(
        "error: RANK=x, WORLD_SIZE=2, LOCAL_RANK=0, LOCAL_WORLD_SIZE=1 in the environment"
    )


def started(launcher, options, **environment):
    return subprocess.Popen(
        [sys.executable, *launcher, "-m", "benchmarks", "compare", *options],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


NAMES = ("results.csv", "comparisons.csv", "summary.csv", "results.md", "results.json")


def same_tables(one, other):
    one, other = tables(one), tables(other)
    return {name: one[name] for name in NAMES} == {name: other[name] for name in NAMES}


@pytest.mark.slow
def test_torchrun_with_two_processes_gives_the_tables_of_one(tiny, tmp_path):
    options = [*tiny, "--bits", "2/2", "4/4", "--seeds", "0", "1", "--cache", str(tmp_path / "cache")]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = started(launcher, options)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert out.count("written to") == 1
    assert compare.main([*options, "--results", str(tmp_path / "one"), "--cache", str(tmp_path / "other")]) == 0
    assert same_tables(tmp_path / "results", tmp_path / "one")


@pytest.mark.slow
def test_torchrun_stops_when_a_process_fails(tiny):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    process = started(launcher, [*tiny, "--n-cat", "99"])
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0 and "error: n_calib=16 plus n_cat=99" in err


@pytest.mark.slow
def test_killed_second_process_does_not_stop_the_first(tiny, tmp_path):
    """Without torchrun, which would stop both: processes as it starts them, of which one is killed at work."""
    options = [*tiny, "--bits", "2/2", "4/4", "--seeds", "0", "1", "2", "--modes", "plain_affine"]
    options += ["--cache", str(tmp_path / "cache")]
    second = started([], options, RANK="1", WORLD_SIZE="2")
    try:
        while second.poll() is None and not list((tmp_path / "results").glob("*/rows/.*.lock")):
            time.sleep(0.01)
    finally:
        second.kill()
        second.communicate()
    (folder,) = (tmp_path / "results").iterdir()
    assert len(list((folder / "rows").glob("*.json"))) < 6, "the process ended before it was killed"
    first = started([], options, RANK="0", WORLD_SIZE="2")
    out, err = first.communicate(timeout=300)
    assert first.returncode == 0 and "written to" in out, err
    assert compare.main([*options, "--results", str(tmp_path / "one"), "--cache", str(tmp_path / "other")]) == 0
    assert same_tables(tmp_path / "results", tmp_path / "one")
