"""Costs checked by hand."""

import csv
import io

from benchmarks.measure.protocol import Setting
from benchmarks.reports.cost_report import PLAIN, costs, to_markdown, write_costs
from tests.benchmarks.rows import cells, make_measurement


def timed(method, seed, quantization, layers=20.0, bits=2, **more):
    parts = {"quantization": quantization, "plain_affine": 1.0, "cat_paper": 2.0, "output": 3.0, "layers": layers}
    parts = {name: seconds for name, seconds in parts.items() if seconds is not None}
    return make_measurement(Setting(method, bits, 4, seed), parts=parts, **more)


RTN = [timed("rtn", seed, 1.0, 20.0 + seed, won=20 + 10 * seed) for seed in (0, 1)]
QDROP = [timed("qdrop", seed, 1000.0 + 500 * seed) for seed in (0, 1)]


def table(measured):
    return cells(to_markdown(measured).split("\n\n")[1])


def test_rounding_to_nearest_with_layers_stands_beside_every_method_without_a_correction():
    header, _, *lines = table([*RTN, *QDROP])
    assert header == ["bits", "method", "quantization", "correction", "seconds", "top-1"]
    assert lines == [
        ["W2A4", "rtn", "1.0", "0.0", "1.0", "90.00 ± 0.00"],
        ["W2A4", "rtn + layers", "1.0", "20.5", "21.5", "94.00 ± 1.41"],
        ["W2A4", "qdrop", "1,250.0", "0.0", "1,250.0", "90.00 ± 0.00"],
    ]


def test_bit_settings_are_apart_and_have_rounding_to_nearest_in_common():
    lines = table([RTN[0], timed("qdrop", 0, 9.0), timed("qdrop", 0, 9.0, bits=4), timed("rtn", 0, 2.0, bits=4)])[2:]
    assert [line[:3] for line in lines] == [
        *(["W2A4", "rtn", "1.0"], ["W2A4", "rtn + layers", "1.0"], ["W2A4", "qdrop", "9.0"]),
        *(["W4A4", "qdrop", "9.0"], ["W4A4", "rtn", "2.0"], ["W4A4", "rtn + layers", "2.0"]),
    ]
    assert len(table([RTN[0], timed("qdrop", 0, 9.0, bits=4)])) == 4  # nothing stands beside qdrop's


def test_unknown_seconds_are_a_dash():
    *_, layers, qdrop = table([RTN[0], timed("qdrop", 0, None), timed("qdrop", 1, 5.0)])
    assert layers[-4:] == ["1.0", "20.0", "21.0", "93.00"]
    assert qdrop[-4:] == ["-", "0.0", "-", "90.00 ± 0.00"]


def test_without_rounding_to_nearest_and_corrected_layers_there_is_no_table():
    assert to_markdown(QDROP) == ""
    assert to_markdown([make_measurement(layers=False, parts={"quantization": 1.0})]) == ""


def test_every_correction_is_a_line_of_the_file(tmp_path):
    assert write_costs(tmp_path, RTN) == {"costs.csv": False, "costs.md": False}
    assert write_costs(tmp_path, RTN) == {"costs.csv": True, "costs.md": True}
    lines = list(csv.DictReader(io.StringIO((tmp_path / "costs.csv").read_text())))
    first = [(line["mode"], line["correction_seconds"], line["top1"]) for line in lines[:5]]
    assert first == [
        ("none", "0.0", "90.0"),
        ("plain_affine", "1.0", "91.0"),
        ("cat_paper", "2.0", "92.6"),
        ("output", "3.0", "92.0"),
        ("layers", "20.0", "93.0"),
    ]
    assert len(lines) == 2 * 5 and {line["quantization_seconds"] for line in lines} == {"1.0"}
    assert [each.seconds for each in costs(RTN[:1])] == [1.0, 2.0, 3.0, 4.0, 21.0]
    assert costs(RTN)[0].mode == PLAIN


def test_rows_without_seconds_have_no_file(tmp_path):
    assert write_costs(tmp_path, [make_measurement()]) == {}
    assert not list(tmp_path.iterdir())
