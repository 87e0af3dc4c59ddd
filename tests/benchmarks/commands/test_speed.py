import csv
import io
from dataclasses import replace

import pytest
import torch

from baselines.reconstruction import recording, unit_run
from benchmarks.commands import speed
from benchmarks.commands.speed import Line, Timing, main, to_csv, to_table
from benchmarks.datasets.imagenet import IMAGENET
from benchmarks.datasets.registry import DATASETS
from tests.recorder import recorder

TINY = ["--dataset", "digits", "--n-calib", "16", "--batch-size", "8", "--steps", "10"]
OTHERS = ["search for ranges", "capturing", "fit of layers, a step", "selection of the output"]
WITH_INPUTS = "TOTAL, FP with gradients of inputs"
UNITS = ["conv1", "layer1.0", "layer2.0", "layer3.0", "fc"]


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def rows(path):
    return list(csv.DictReader(io.StringIO(path.read_text("utf-8"))))


@pytest.mark.parametrize(
    ("method", "units"),
    [("qdrop", UNITS), ("brecq", [*(f"{u} (stage 1)" for u in UNITS), *(f"{u} (stage 2)" for u in UNITS[1:])])],
)
def test_every_unit_is_timed_and_the_total_is_their_sum(tmp_path, capsys, method, units):
    assert main([*TINY, "--method", method, "--results", str(tmp_path)]) == 0
    (path,) = (tmp_path / "speed").iterdir()
    assert path.name == f"digits-resnet8-{method}-w2a2.csv"
    lines, others = rows(path)[: len(units) + 2], rows(path)[len(units) + 2 :]
    *lines, total, with_inputs = lines
    assert [line["unit"] for line in lines] == units and total["unit"] == "TOTAL"
    assert [line["unit"] for line in others] == OTHERS
    assert all(float(line["iter_ms"]) > 0 and float(line["fp_ms"]) > 0 for line in others)
    for column in ("iter_ms", "fp_ms"):
        assert all(float(line[column]) > 0 for line in lines)
        assert float(total[column]) == pytest.approx(sum(float(line[column]) for line in lines), abs=1e-2)
    assert with_inputs["unit"] == WITH_INPUTS and with_inputs["iter_ms"] == total["iter_ms"]
    for line in (*lines, total, with_inputs, *others):
        assert float(line["ratio"]) == pytest.approx(float(line["iter_ms"]) / float(line["fp_ms"]), rel=0.02)
    printed = capsys.readouterr().out
    assert all(f"| {unit} " in printed for unit in (*units, "TOTAL")) and str(path) in printed


def test_random_images_stand_in_where_no_data_are_given(tmp_path):
    images = speed._images(speed.parse_speed(["--n-calib", "40"]))
    assert images.shape == (40, 3, 32, 32)


def test_fp_steps_are_a_training_pass_of_the_fp_unit(monkeypatch):
    """The gradients of all weights and biases, and nothing left behind in the network that is reconstructed."""
    checked, asked = [], []

    def check(run, steps, batch_size, with_inputs):
        asked.append(with_inputs)
        for inputs, turns in ((True, (False, True)), (False, (False, False))):
            theirs = speed._fp_steps(run, batch_size, inputs)
            for of_input in turns:
                output = next(theirs)
                unit, given = (theirs.gi_frame.f_locals[name] for name in ("unit", "given"))
                assert all(parameter.grad is not None for parameter in unit.parameters())
                assert (given.grad is not None) == of_input
        assert len(output) == batch_size and output.requires_grad
        assert not any(p.requires_grad or p.grad is not None for p in run.fp_module.parameters())
        with torch.no_grad():
            expected = run.fp_module(run.data.fp_input.batch(0, batch_size))
            expected = expected if run.activation is None else run.activation(expected)
        torch.testing.assert_close(output.detach(), expected)
        checked.append(run.unit.name)
        for _ in run.steps():
            pass
        return (2.0, 1.0, *([1.25] if with_inputs else [])), None

    monkeypatch.setattr(speed, "_timed", check)
    timing = speed.measure(speed._job(speed.parse_speed(TINY)), 10)
    assert checked == UNITS and asked == [True] * len(UNITS)
    assert timing.lines[-1] == Line(unit="TOTAL", iter_ms=10.0, fp_ms=5.0)
    assert timing.with_inputs == Line(unit=WITH_INPUTS, iter_ms=10.0, fp_ms=6.25)
    without = speed.measure(speed._job(speed.parse_speed([*TINY, "--method", "adaround"])), 10)
    assert without.with_inputs is None and asked[len(UNITS) :] == [False] * len(
        without.lines[:-1]
    )  # nothing needs them


def test_table_and_csv_by_hand():
    lines = Line(unit="a", iter_ms=3.0, fp_ms=2.0), Line(unit="TOTAL", iter_ms=3.0, fp_ms=2.0)
    ranges = Line(unit="search for ranges", iter_ms=500.0, fp_ms=250.0)
    timing = Timing(lines=lines, range_seconds=0.5, capture_seconds=1.5, others=(ranges,), peak_bytes=3 * 2**29)
    assert to_csv(timing).splitlines() == [
        "unit,iter_ms,eager_ms,fp_ms,ratio",
        "a,3.0000,,2.0000,1.5000",
        "TOTAL,3.0000,,2.0000,1.5000",
        "search for ranges,500.0000,,250.0000,2.0000",
    ]
    table = to_table(timing)
    assert "5 s, of which 0.50 s (10.0%) search for ranges and 1.50 s (30.0%) capture" in table
    assert "| search for ranges | 500.0 | 250.0 |  2.00 |" in table and "Peak memory: 1.50 GiB" in table
    assert "not recorded" not in table


def test_where_the_device_records_plain_iterations_are_timed_beside(monkeypatch):
    for module in (speed, recording, unit_run):
        monkeypatch.setattr(module, "recorder_for", lambda device: recorder([]))
    options = [*TINY[:-1], "30"]
    timing = speed.measure(speed._job(speed.parse_speed(options)), 30)
    assert all(line.eager_ms > 0 for line in timing.lines)
    assert timing.lines[-1].eager_ms == pytest.approx(sum(line.eager_ms for line in timing.lines[:-1]))
    assert "not recorded" in to_table(timing) and to_csv(timing).splitlines()[1].count(",,") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--method", "rtn"], "no iterations to time"),
        (["--model", "resnet20"], "--model resnet20 is not for digits"),
        (["--data", "x.zip"], "--data is not for digits"),
        (["--weights", "none.pt"], "no such weights file"),
        (["--n-calib", "4"], "less than one batch"),
    ],
)
def test_unusable_options_are_errors_of_the_user(options, message, capsys, tmp_path):
    assert main([*TINY, "--results", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_data_of_imagenet_are_not_read(tmp_path, capsys):
    assert main(["--dataset", "imagenet", "--data", str(tmp_path), "--results", str(tmp_path)]) == 2
    assert "random images in place of ImageNet's; leave --data out" in capsys.readouterr().err


@pytest.mark.slow
def test_network_for_imagenet_is_timed_on_random_images(tmp_path, monkeypatch):
    monkeypatch.setitem(DATASETS, IMAGENET.name, replace(IMAGENET, image_shape=(3, 32, 32)))
    options = ["--dataset", "imagenet", "--model", "mobilenet_v2", *TINY[2:], "--results", str(tmp_path)]
    assert main(options) == 0
    lines = rows(tmp_path / "speed" / "imagenet-mobilenet_v2-qdrop-w2a2.csv")
    names = [line["unit"] for line in lines]
    assert (
        names[-len(OTHERS) :] == OTHERS
        and names[-len(OTHERS) - 2 : -len(OTHERS)] == ["TOTAL", WITH_INPUTS]
        and len(lines) > 10 + len(OTHERS)
    )
