"""Tables checked by hand."""

import sys

import pytest

from benchmarks.measure.draws import Gain
from benchmarks.measure.paired_logits import Source
from benchmarks.reports.robustness_report import plot, shortfalls, sizes_table, sources_table, to_markdown, write_report
from tests.benchmarks.rows import cells

BASE = {"n_eval": 100, "fp_top1": 90.0, "top1": 0.0, "ci_low": 0.0, "ci_high": 0.0}
REST = {"p_value": 1.0, "won": 0, "lost": 0}


def gain(source, images, draw, mode, points, lq_top1=80.0):
    row = {"source": source, "images": images, "draw": draw, "mode": mode, "gain": points, "lq_top1": lq_top1}
    return Gain(**row, **BASE, **REST)


GAINS = [
    gain("a", 32, 0, "plain_affine", 1.0),
    gain("a", 32, 0, "output", 0.5),
    gain("a", 1024, 0, "plain_affine", 1.0),
    gain("a", 1024, 0, "cat_paper", -20.0),
    gain("a", 1024, 0, "output", 0.0),
    gain("a", 1024, 1, "plain_affine", 2.0),
    gain("a", 1024, 1, "cat_paper", -1.0),
    gain("a", 1024, 1, "output", 0.25),
    gain("b", 1024, 0, "plain_affine", -0.25, lq_top1=70.0),
    gain("b", 1024, 0, "cat_paper", 3.0, lq_top1=70.0),
    gain("b", 1024, 0, "output", 0.5, lq_top1=70.0),
]


def test_one_line_a_size_and_mode():
    header, rule, *lines = cells(sizes_table(GAINS))
    assert header == ["images", "correction", "mean gain", "worst draw", "draws that lose", "draws"]
    assert set("".join(rule)) == {"-", ":"}
    assert lines == [
        ["32", "plain affine", "+1.00", "+1.00", "0%", "1"],
        ["32", "output", "+0.50", "+0.50", "0%", "1"],
        ["1,024", "plain affine", "+0.92", "-0.25", "33%", "3"],
        ["1,024", "paper", "-6.00", "-20.00", "67%", "3"],
        ["1,024", "output", "+0.25", "+0.00", "0%", "3"],
    ]


def test_one_line_a_source_and_size():
    header, _, *lines = cells(sources_table(GAINS))
    assert header == ["source", "images", "draws", "FP", "low-bit", "plain affine", "paper", "output"]
    assert lines == [
        ["a", "32", "1", "90.00", "80.00", "+1.00", "-", "+0.50"],
        ["a", "1,024", "2", "90.00", "80.00", "+1.50", "-10.50", "+0.12"],
        ["b", "1,024", "1", "90.00", "70.00", "-0.25", "+3.00", "+0.50"],
    ]


def test_text_holds_both_tables_and_the_notes():
    text = to_markdown(GAINS, ["Something is missing."])
    assert "on 2 sources:" in text and text.endswith("\n\nSomething is missing.")
    assert sizes_table(GAINS) in text and sources_table(GAINS) in text


def test_draws_that_do_not_fit_are_told_once_for_all_sources_alike():
    fresh = {"a": 700, "b": 9000, "c": 700}
    sources = [Source(name=name, digest="", fresh=images, load=None) for name, images in fresh.items()]
    assert shortfalls(sources, [100, 512, 4096], 5) == [
        "Fewer than 5 draws of a size in a and 1 more: 700 fresh images are 5 of 100, 1 of 512, 0 of 4,096.",
        "Fewer than 5 draws of a size in b: 9,000 fresh images are 5 of 100, 5 of 512, 2 of 4,096.",
    ]
    assert not shortfalls(sources, [100], 5)


def test_report_has_every_row_and_a_figure(tmp_path):
    pytest.importorskip("matplotlib")
    assert list(write_report(tmp_path, GAINS, [])) == ["results.csv", "results.md", "robustness.png"]
    assert (tmp_path / "robustness.png").read_bytes().startswith(b"\x89PNG")
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert header.startswith("source,images,draw,mode,n_eval,fp_top1,lq_top1,top1,gain,")
    assert len(lines) == len(GAINS) and lines[3].startswith("a,1024,0,cat_paper,100,90.0,80.0,0.0,-20.0,")


def test_every_draw_is_a_dot_in_the_panel_of_its_mode(tmp_path, monkeypatch):
    figure = pytest.importorskip("matplotlib.figure")
    drawn, real = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), real(self, *a, **k))[1])
    assert plot(GAINS, tmp_path / "robustness.png")
    found = {panel.get_title(): panel.collections[0].get_offsets().tolist() for panel in drawn[0].axes}
    assert {title: [y for _, y in dots] for title, dots in found.items()} == {
        "plain affine": [1.0, 1.0, 2.0, -0.25],
        "paper": [-20.0, -1.0, 3.0],
        "output": [0.5, 0.0, 0.25, 0.5],
    }
    assert [round(x) for x, _ in found["plain affine"]] == [0, 1, 1, 1]


def test_without_matplotlib_there_is_no_figure(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert list(write_report(tmp_path, GAINS, [])) == ["results.csv", "results.md"]
    assert "pip install matplotlib" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.md"]
