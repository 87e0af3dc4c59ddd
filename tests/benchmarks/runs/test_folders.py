import json

import pytest

from benchmarks import BenchmarkError
from benchmarks.runs.folders import open_run, read_settings, write_environment

SETTINGS = {"dataset": "digits", "model": "resnet8", "versions": {"torch": "2.4"}}


def opened(tmp_path, settings=SETTINGS, **options):
    return open_run(tmp_path, "digits-resnet8", settings, **options)


def test_fresh_forgets(tmp_path):
    (opened(tmp_path) / "row.json").touch()
    assert (opened(tmp_path) / "row.json").exists()
    assert not (opened(tmp_path, fresh=True) / "row.json").exists()


def test_folder_follows_from_the_settings(tmp_path):
    folder = opened(tmp_path)
    assert folder.name.startswith("digits-resnet8-")
    assert opened(tmp_path, dict(reversed(SETTINGS.items()))) == folder
    assert opened(tmp_path, {**SETTINGS, "versions": {"torch": "2.5"}}) != folder


def test_named_run_with_other_settings_is_refused_unless_fresh(tmp_path):
    (opened(tmp_path, name="mine") / "row.json").touch()
    other = {**SETTINGS, "model": "resnet20"}
    with pytest.raises(BenchmarkError, match=r"made with other settings \(model: resnet8 then, resnet20 now\)"):
        opened(tmp_path, other, name="mine")
    assert (opened(tmp_path, name="mine") / "row.json").exists()
    assert not (opened(tmp_path, other, name="mine", fresh=True) / "row.json").exists()


@pytest.mark.parametrize("fresh", [False, True])
def test_folder_of_something_else_is_left_alone(tmp_path, fresh):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(BenchmarkError, match="mine exists and is not a benchmark run"):
        opened(tmp_path, name="mine", fresh=fresh)
    assert (tmp_path / "mine" / "thesis.txt").exists()


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/a"])
def test_names_that_are_paths_are_refused(tmp_path, name):
    with pytest.raises(BenchmarkError, match="must be a plain folder name"):
        opened(tmp_path, name=name)


def test_run_that_was_killed_while_its_first_file_was_written_starts_anew(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / ".settings.json.x1y2.part").write_text('{"datas')
    assert opened(tmp_path, name="mine") == tmp_path / "mine"


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_settings_are_read_from_runs_only(tmp_path, content):
    folder = opened(tmp_path, name="mine")
    assert read_settings(folder) == SETTINGS
    path = folder / "settings.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(BenchmarkError, match=r"mine is not the folder of a run: it has no readable settings\.json"):
        read_settings(folder)


def test_environment_stays_that_of_the_first_call_but_for_the_seconds(tmp_path):
    path = tmp_path / "environment.json"
    write_environment(tmp_path, {"command": "first", "finished": "then", "seconds": 3.0})
    write_environment(tmp_path, {"command": "second", "finished": "now", "seconds": 5.0})
    assert json.loads(path.read_text()) == {"command": "first", "finished": "then", "seconds": 5.0}
    path.write_text('{"comm')
    write_environment(tmp_path, {"command": "third", "finished": "now", "seconds": 5.0})
    assert json.loads(path.read_text())["command"] == "third"
