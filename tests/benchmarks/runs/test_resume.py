import json
from dataclasses import replace

import pytest

from benchmarks import BenchmarkError
from benchmarks.measure.accuracy import Measurement
from benchmarks.measure.protocol import Setting
from benchmarks.runs.resume import Rows
from tests.benchmarks.rows import all_same, make_measurement

GRID = [Setting("rtn", 2, 2, seed) for seed in range(4)]
NAMES = [setting.name for setting in GRID]


def measure(setting):
    return make_measurement(setting, won=10 + setting.seed)


EXPECTED = [measure(setting) for setting in GRID]


def failing_at(seed):
    def fail(setting):
        if setting.seed == seed:
            raise KeyboardInterrupt
        return measure(setting)

    return fail


def rows(tmp_path):
    return Rows(tmp_path, Measurement)


def never(setting):
    raise AssertionError(f"{setting.name} was measured again")


def test_comparison_of_measurements_sees_what_is_missing():
    assert all_same(EXPECTED, [measure(setting) for setting in GRID])
    assert not all_same(EXPECTED[:-1], EXPECTED) and not all_same(EXPECTED, EXPECTED[:-1])
    assert not all_same(EXPECTED[::-1], EXPECTED)


def test_stopped_run_goes_on_where_it_stopped(tmp_path):
    run = rows(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        run.complete(GRID, failing_at(2))
    again = rows(tmp_path)
    assert sorted(again.finished(NAMES)) == [setting.name for setting in GRID[:2]]
    measured = []
    found = again.complete(GRID, lambda setting: (measured.append(setting), measure(setting))[1])
    assert measured == GRID[2:] and len(found) == len(GRID)
    assert all_same(found, EXPECTED)
    assert all_same(rows(tmp_path).complete(GRID, never), EXPECTED)


def test_unreadable_row_is_measured_again(tmp_path, caplog):
    run = rows(tmp_path)
    run.complete(GRID, measure)
    (tmp_path / f"{GRID[1].name}.json").write_text('{"dataset": "dig')
    (tmp_path / f"{GRID[2].name}.json").write_text('{"dataset": "digits"}')
    (tmp_path / f"{GRID[3].name}.safetensors").write_bytes(b"\x08")
    (tmp_path / f"{GRID[0].name}.safetensors").unlink()
    assert not run.finished(NAMES)
    assert all_same(run.complete(GRID, measure), EXPECTED)
    assert "the stored row rtn-w2a2-seed1 is unreadable" in caplog.text


def test_forgotten_rows_are_measured_again_and_others_are_kept(tmp_path):
    run = rows(tmp_path)
    run.complete(GRID, measure)
    run.forget(NAMES[:1])
    run.forget(NAMES[:1])
    assert sorted(run.finished(NAMES)) == [setting.name for setting in GRID[1:]]


def test_seconds_are_stored_beside_the_row(tmp_path):
    run = rows(tmp_path)
    run.complete(GRID[:2], lambda setting: replace(measure(setting), seconds=1.5 + setting.seed))
    path = tmp_path / f"{GRID[1].name}.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != "seconds"}))
    found = run.complete(GRID[:2], never)
    assert [measurement.seconds for measurement in found] == [1.5, 0.0]
    assert all_same(found, EXPECTED[:2])


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_row_of_another_type_is_measured_again(tmp_path, content):
    run = rows(tmp_path)
    run.complete(GRID, measure)
    (tmp_path / f"{GRID[2].name}.json").write_text(content)
    assert len(run.finished(NAMES)) == 3


def test_rows_that_another_run_has_left_are_shared(tmp_path):
    Rows(tmp_path / "one", Measurement, tmp_path / "shared").complete(GRID[:2], measure)
    calls = []
    other = Rows(tmp_path / "two", Measurement, tmp_path / "shared")
    found = other.complete(GRID, lambda setting: (calls.append(setting), measure(setting))[1])
    assert calls == GRID[2:] and all_same(found, EXPECTED)
    assert all_same(Rows(tmp_path / "two", Measurement).stored(NAMES), EXPECTED)
    other.forget(NAMES[:1])
    assert sorted(Rows(tmp_path / "three", Measurement, tmp_path / "shared").finished(NAMES)) == NAMES[1:]


def test_stored_rows_are_all_there_and_hold_the_figures_of_their_predictions(tmp_path):
    run = rows(tmp_path)
    run.complete(GRID, measure)
    assert all_same(run.stored(NAMES[::-1]), EXPECTED[::-1])
    path = tmp_path / f"{NAMES[1]}.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "lq_top1": 1.0, "layers_delta": 92.2}))
    with pytest.raises(
        BenchmarkError, match=rf"row {NAMES[1]} does not .* lq_top1 1.0 instead of 90.0; layers_delta 92.2"
    ):
        run.stored(NAMES)
    path.unlink()
    with pytest.raises(BenchmarkError, match=f"lacks 1 of 4 rows, such as {NAMES[1]}"):
        run.stored(NAMES)
