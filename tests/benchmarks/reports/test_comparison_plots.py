"""What the figures of a comparison hold, read back from their bars, texts and lines."""

import dataclasses
import sys

import pytest
import torch

from benchmarks.measure.accuracy import Measurement
from benchmarks.measure.comparisons import summarize
from benchmarks.measure.corrections import MODES
from benchmarks.measure.paired_logits import rank_name
from benchmarks.measure.protocol import Setting
from benchmarks.reports.comparison_plots import class_gains, draw_changes, draw_gains, draw_logits, plot_comparison
from cat_plugin.report.clusters import ClusterProfile
from tests.benchmarks.rows import make_measurement

pytest.importorskip("matplotlib")

SETTINGS = [Setting(method, bits, 4, seed) for method in ("rtn", "qdrop") for bits in (2, 4) for seed in (0, 1)]
MEASURED = [make_measurement(setting, won=20 + 5 * setting.seed) for setting in SETTINGS]


def with_profile(measurement, **row):
    profile = ClusterProfile(2, 30, (0, 1), (1.0, -1.0), (0.5, -0.5), (0.9, -0.9), 0.4, 0.1)
    return Measurement(dataclasses.replace(measurement.row, **row), measurement.predictions, 1.0, (profile,))


def of_classes(labels, lq, cat):
    parts = {"labels": labels, "fp": labels, "lq": lq, "layers": cat}
    predictions = {name: torch.tensor(part, dtype=torch.int16) for name, part in parts.items()}
    return Measurement(make_measurement().row, predictions)


def test_bars_are_mean_gains_and_lines_their_intervals():
    figure = draw_gains(MEASURED)
    lines = {(line.method, line.mode, line.w_bits): line for line in summarize(MEASURED)}
    assert [panel.get_title() for panel in figure.axes] == ["rtn", "qdrop"]
    for panel in figure.axes:
        for bars, mode in zip(panel.containers[::2], MODES, strict=True):
            found = [lines[panel.get_title(), mode, bits] for bits in (2, 4)]
            assert [bar.get_height() for bar in bars] == [line.delta for line in found]
            assert bars.get_label() == MODES[mode]
        for errors, mode in zip(panel.containers[1::2], MODES, strict=True):
            found = [lines[panel.get_title(), mode, bits] for bits in (2, 4)]
            ends = [segment[:, 1].tolist() for segment in errors[2][0].get_segments()]
            assert ends == [pytest.approx([line.seeds_ci_low, line.seeds_ci_high]) for line in found]
        assert [tick.get_text() for tick in panel.get_xticklabels()] == ["W2A4", "W4A4"]


def test_gain_of_a_class_is_in_percent_of_its_images():
    """Class 0 wins one image of four, class 1 loses one of two, class 2 wins one and loses one."""
    labels = [0, 0, 0, 0, 1, 1, 2, 2]
    measured = of_classes(labels, lq=[1, 0, 0, 1, 1, 1, 0, 2], cat=[0, 0, 0, 1, 1, 0, 2, 1])
    ((name, gains),) = class_gains([measured])
    assert name == "rtn W2A2" and gains.tolist() == [25.0, -50.0, 0.0]
    measured.predictions[rank_name("lq")] = torch.full((8,), 99, dtype=torch.int16)  # are no classes
    assert len(next(class_gains([measured]))[1]) == 3
    figure = draw_changes([measured], ["a", "b", "c"])
    panel = figure.axes[0]
    assert [text.get_text() for text in panel.texts] == ["+25.0", "-50.0", "+0.0"]
    assert [tick.get_text() for tick in panel.get_xticklabels()] == ["a", "b", "c"]
    assert panel.images[0].get_array().tolist() == [[25.0, -50.0, 0.0]]


def test_gain_of_a_class_is_the_mean_over_seeds():
    first = of_classes([0, 0, 1, 1], lq=[1, 1, 1, 1], cat=[0, 0, 1, 1])
    second = of_classes([0, 0, 1, 1], lq=[1, 1, 1, 1], cat=[1, 0, 0, 0])
    ((_, gains),) = class_gains([first, second])
    assert gains.tolist() == [75.0, -50.0]


def test_of_many_classes_those_that_change_most_are_drawn():
    labels = list(range(50)) * 2
    lq = [label if label != 7 else 0 for label in labels]  # class 7 is all wrong, and wins
    cat = [label if label != 9 else 0 for label in labels]  # class 9 loses
    panel = draw_changes([of_classes(labels, lq, cat)], [f"class {label}" for label in range(50)]).axes[0]
    shown = [tick.get_text() for tick in panel.get_xticklabels()]
    assert len(shown) == 20 and shown[0] == "class 9" and shown[-1] == "class 7"
    assert "10 classes at either end" in panel.get_title()


def test_logits_are_those_of_the_network_that_gains_most():
    little, most = (with_profile(MEASURED[index], layers_delta=gain) for index, gain in ((0, 1.0), (5, 2.0)))
    figure = draw_logits([little, most, MEASURED[1]], ["a", "b"])
    assert f"{most.row.method}, W{most.row.w_bits}A4, seed {most.row.seed}" in figure.get_suptitle()
    above, below = figure.get_axes()
    lines = {line.get_label(): list(line.get_ydata()) for line in above.lines}
    assert lines == {"full precision": [1.0, -1.0], "quantized": [0.5, -0.5], "with CAT": [0.9, -0.9]}
    assert [bar.get_height() for bar in below.patches] == pytest.approx([-0.5, 0.5, -0.1, 0.1])
    assert draw_logits(MEASURED, ["a", "b"]) is None


def test_a_stored_row_keeps_its_profile(tmp_path):
    measurement = with_profile(MEASURED[0])
    measurement.store(tmp_path / "row.json")
    assert Measurement.load(tmp_path / "row.json").profiles == measurement.profiles
    MEASURED[0].store(tmp_path / "plain.json")
    assert Measurement.load(tmp_path / "plain.json").profiles == ()


def test_writes_what_can_be_drawn(tmp_path, monkeypatch, caplog):
    expected = ["gains.png", "classes.png", "logits.png"]
    assert list(plot_comparison(tmp_path, [with_profile(MEASURED[0])], None)) == expected
    for name in expected:
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    (tmp_path / "without").mkdir()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plot_comparison(tmp_path / "without", [with_profile(MEASURED[0])], None) == {}
    assert "pip install matplotlib" in caplog.text and not list((tmp_path / "without").iterdir())
