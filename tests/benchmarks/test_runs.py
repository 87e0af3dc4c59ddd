import pytest

from benchmarks import BenchmarkError
from benchmarks.evaluate import Setting
from benchmarks.runs import Run
from tests.benchmarks.rows import make_measurement, same

SETTINGS = {"dataset": "digits", "model": "resnet8", "versions": {"torch": "2.4"}}
GRID = [Setting("rtn", 2, 2, seed) for seed in range(4)]


def measure(setting):
    return make_measurement(setting, won=10 + setting.seed, lq_top1=90.0 + setting.seed)


def failing_at(seed):
    def fail(setting):
        if setting.seed == seed:
            raise KeyboardInterrupt
        return measure(setting)

    return fail


def never(setting):
    raise AssertionError(f"{setting.name} was measured again")


def test_stopped_run_goes_on_where_it_stopped(tmp_path):
    run = Run.open(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run.complete(GRID, failing_at(2))
    again = Run.open(tmp_path, SETTINGS)
    assert sorted(again.finished()) == [setting.name for setting in GRID[:2]]
    measured = []
    found = again.complete(GRID, lambda setting: (measured.append(setting), measure(setting))[1])
    assert measured == GRID[2:] and len(found) == len(GRID)
    assert all(map(same, found, map(measure, GRID)))
    assert all(map(same, found, Run.open(tmp_path, SETTINGS).complete(GRID, never)))


def test_unreadable_row_is_measured_again(tmp_path, caplog):
    run = Run.open(tmp_path, SETTINGS)
    run.complete(GRID, measure)
    (run.folder / "rows" / f"{GRID[1].name}.json").write_text('{"dataset": "dig')
    (run.folder / "rows" / f"{GRID[2].name}.json").write_text('{"dataset": "digits"}')
    (run.folder / "rows" / f"{GRID[3].name}.safetensors").write_bytes(b"\x08")
    (run.folder / "rows" / f"{GRID[0].name}.safetensors").unlink()
    assert not run.finished()
    assert all(map(same, run.complete(GRID, measure), map(measure, GRID)))
    assert "the stored row rtn-w2a2-seed1 is unreadable" in caplog.text


def test_fresh_forgets(tmp_path):
    Run.open(tmp_path, SETTINGS).complete(GRID, measure)
    assert not Run.open(tmp_path, SETTINGS, fresh=True).finished()


def test_folder_follows_from_the_settings(tmp_path):
    folder = Run.open(tmp_path, SETTINGS).folder
    assert folder.name.startswith("digits-resnet8-")
    assert Run.open(tmp_path, dict(reversed(SETTINGS.items()))).folder == folder
    assert Run.open(tmp_path, {**SETTINGS, "versions": {"torch": "2.5"}}).folder != folder


def test_named_run_with_other_settings_is_refused_unless_fresh(tmp_path):
    Run.open(tmp_path, SETTINGS, name="mine").complete(GRID, measure)
    other = {**SETTINGS, "model": "resnet20"}
    with pytest.raises(BenchmarkError, match=r"made with other settings \(model: resnet8 then, resnet20 now\)"):
        Run.open(tmp_path, other, name="mine")
    assert len(Run.open(tmp_path, SETTINGS, name="mine").finished()) == 4
    assert not Run.open(tmp_path, other, name="mine", fresh=True).finished()


@pytest.mark.parametrize("fresh", [False, True])
def test_folder_of_something_else_is_left_alone(tmp_path, fresh):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BenchmarkError, match="mine exists and is not a benchmark run"):
        Run.open(tmp_path, SETTINGS, name="mine", fresh=fresh)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/a"])
def test_names_that_are_paths_are_refused(tmp_path, name):
    with pytest.raises(BenchmarkError, match="must be a plain folder name"):
        Run.open(tmp_path, SETTINGS, name=name)
