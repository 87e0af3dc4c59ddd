"""Tables checked by hand, and what is drawn."""

import pytest

from benchmarks.anchors import SOURCE, load_anchors
from benchmarks.reports.ablation_report import (
    Line,
    anchors_table,
    factor_markdown,
    plot,
    sources_table,
    to_markdown,
    write_report,
)
from tests.benchmarks.rows import cells

BASE = {"images": 64, "n_eval": 100, "fp_top1": 90.0, "top1": 0.0, "ci_low": 0.0, "ci_high": 0.0}
REST = {"p_value": 1.0, "won": 0, "lost": 0}


def line(factor, value, source, mode, gain, draw=0, lq_top1=80.0):
    given = {"factor": factor, "value": value, "source": source, "mode": mode, "gain": gain, "draw": draw}
    return Line(**given, lq_top1=lq_top1, **BASE, **REST)


ALPHA = [
    line("alpha", 0.5, "a", "cat_paper", -1.0),
    line("alpha", 0.5, "a", "output", 0.5),
    line("alpha", 1.0, "a", "cat_paper", -3.0, draw=0),
    line("alpha", 1.0, "a", "cat_paper", 1.0, draw=1),
    line("alpha", 1.0, "a", "output", 0.25),
    line("alpha", 0.5, "b", "output", 1.5, lq_top1=70.0),
]
ORIGIN = [line("origin", "fresh", "a", "output", 0.5), line("origin", "tuned", "a", "output", 0.25)]


def tables(text):
    return [part for part in text.split("\n\n") if part.startswith("|")]


def test_one_line_a_value_and_mode():
    header, _, *lines = cells(tables(factor_markdown("alpha", ALPHA))[0])
    assert header == ["alpha", "correction", "mean gain", "worst draw", "draws that lose", "draws"]
    assert lines == [
        ["0.5", "paper", "-1.00", "-1.00", "100%", "1"],
        ["0.5", "output", "+1.00", "+0.50", "0%", "2"],
        ["1", "paper", "-1.00", "-3.00", "50%", "2"],
        ["1", "output", "+0.25", "+0.25", "0%", "1"],
    ]


def test_one_line_a_source_and_mode():
    header, _, *lines = cells(sources_table(ALPHA))
    assert header == ["source", "correction", "low-bit", "0.5", "1"]
    assert lines == [
        ["a", "paper", "80.00", "-1.00", "-1.00"],
        ["a", "output", "80.00", "+0.50", "+0.25"],
        ["b", "output", "70.00", "+1.50", "-"],
    ]


def test_published_figures_stand_beside_ours_with_their_source():
    text = factor_markdown("alpha", ALPHA)
    assert SOURCE in text and anchors_table(load_anchors("alpha")) in text
    header, _, *lines = cells(anchors_table(load_anchors("images")))
    assert header[:4] == ["network", "bits", "640", "3,200"] and header[-1] == "1,281,167"
    assert [row[:4] for row in lines] == [["resnet18", "W2A2", "-6.42", "-1.11"], ["resnet18", "W4A4", "-1.09", "-"]]
    assert "published" not in factor_markdown("origin", ORIGIN)


def test_every_factor_has_its_files(tmp_path):
    pytest.importorskip("matplotlib")
    files = write_report(tmp_path, [*ALPHA, *ORIGIN], ["Something is missing."])
    expected = [f"{factor}.{ending}" for factor in ("alpha", "origin") for ending in ("csv", "md", "png")]
    assert list(files) == expected
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(expected)
    assert (tmp_path / "alpha.md").read_text().endswith("\n\nSomething is missing.\n")
    assert len((tmp_path / "alpha.csv").read_text().splitlines()) == 1 + len(ALPHA)
    assert (tmp_path / "alpha.png").read_bytes().startswith(b"\x89PNG")
    text = to_markdown([*ALPHA, *ORIGIN], ["Something is missing."])
    assert text.count("Something is missing.") == 1 and text.count("Mean gain of each source:") == 2


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were written."""
    figure = pytest.importorskip("matplotlib.figure")
    seen, real = [], figure.Figure.savefig
    monkeypatch.setattr(figure.Figure, "savefig", lambda self, *a, **k: (seen.append(self), real(self, *a, **k))[1])
    return seen


def test_sources_their_mean_and_published_curves_are_drawn(tmp_path, drawn):
    assert plot("alpha", ALPHA, tmp_path / "alpha.png")
    paper, default, authors = drawn[0].axes
    assert [panel.get_title().split("\n")[0] for panel in drawn[0].axes] == [
        "paper, here",
        "output, here",
        "authors: ImageNet, PD-Quant",
    ]
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in paper.lines}
    assert curves["a"] == [[0.5, -1.0], [1.0, -1.0]]
    curves = {curve.get_label(): curve.get_xydata().tolist() for curve in default.lines}
    assert curves["mean over draws of all sources"] == [[0.5, 1.0], [1.0, 0.25]]
    published = [curve.get_xydata() for curve in authors.lines if len(curve.get_xydata()) == 10]
    assert len(published) == 24
    assert [text.get_text() for text in authors.get_legend().get_texts()] == ["W2A2", "W2A4", "W4A2", "W4A4"]


def test_values_that_are_names_stand_side_by_side(tmp_path, drawn):
    assert plot("origin", ORIGIN, tmp_path / "origin.png")
    (panel,) = drawn[0].axes
    assert [label.get_text() for label in panel.get_xticklabels()] == ["fresh", "tuned"]
    assert panel.lines[0].get_xydata().tolist() == [[0, 0.5], [1, 0.25]]
