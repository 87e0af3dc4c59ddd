"""What figures hold, read back from their bars, marks and lines."""

import dataclasses
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from cat_plugin import CATConfig, CATError, apply_cat
from cat_plugin.fitting.scores import ErrorScores
from cat_plugin.layers.evidence import LayerChange, LayersEvidence
from cat_plugin.metrics import ClassChanges
from cat_plugin.report.figures import CLASSES_DRAWN, draw_classes
from tests.cat_plugin.helpers import images, model_pair

matplotlib = pytest.importorskip("matplotlib")
matplotlib_figure = pytest.importorskip("matplotlib.figure")
NAMES = [f"name {label}" for label in range(10)]


@pytest.fixture(scope="module")
def report():
    quantized, fp = (model.eval() for model in model_pair())
    x = images(600)
    with torch.no_grad():
        labels = fp(x).argmax(dim=1)
    loader = DataLoader(TensorDataset(x, labels), 64)
    return apply_cat(quantized, fp, x, eval_loader=loader, config=CATConfig(num_clusters=4)).report


def panels(figure):
    return {panel.get_title().partition("\n")[0]: panel for panel in figure.get_axes()}


def test_figure_holds_what_the_report_says(report):
    found = panels(report.plot(class_names=NAMES))
    gains = found["what CAT gains"]
    paired, held_out = report.accuracy.paired, report.held_out
    assert [bar.get_width() for bar in gains.patches] == pytest.approx([paired.delta, held_out.agreement_gain])
    intervals = [line.get_xdata() for line in gains.lines if len(line.get_xdata()) == 2 and line.get_zorder() > 1]
    expected = [(paired.ci_low, paired.ci_high), (held_out.gain_low, held_out.gain_high)]
    assert [tuple(pair) for pair in intervals] == [pytest.approx(pair) for pair in expected]
    assert f"FP {report.accuracy.fp_top1:.2f} %" in gains.texts[0].get_text()

    families = found["families of maps (share of the weight)"]
    candidates = report.evidence.candidates
    assert list(families.lines[0].get_xdata()) == [candidate.kl_gain for candidate in candidates]
    labels = [label.get_text() for label in families.get_yticklabels()]
    assert labels == [f"{candidate.name} ({candidate.weight:.0%})" for candidate in candidates]

    profiles = [title for title in found if title.startswith(("cluster", "1 cluster"))]
    assert len(profiles) == len(report.clusters)
    for title, profile in zip(profiles, report.clusters, strict=True):
        lines = {line.get_label(): list(line.get_ydata()) for line in found[title].lines}
        means = {"full precision": profile.fp, "quantized": profile.quantized, "with CAT": profile.corrected}
        assert lines == {name: list(values) for name, values in means.items()}


def test_below_the_logits_are_their_distances_from_full_precision(report):
    every = report.plot().get_axes()
    differences = [panel for panel in every if panel.patches and not panel.get_title()]
    for panel, profile in zip(differences, report.clusters, strict=True):
        heights = [bar.get_height() for bar in panel.patches]
        quantized = [value - fp for value, fp in zip(profile.quantized, profile.fp, strict=True)]
        corrected = [value - fp for value, fp in zip(profile.corrected, profile.fp, strict=True)]
        assert heights == pytest.approx(quantized + corrected)


def test_classes_are_sorted_by_what_they_gain():
    figure = matplotlib_figure.Figure()
    panel = figure.subplots()
    draw_classes(panel, ClassChanges(4, (0, 1, 2), won=(3, 0, 9), lost=(1, 4, 2)), "title", ["a", "b", "c", "d"])
    assert [label.get_text() for label in panel.get_yticklabels()] == ["b", "a", "c"]
    assert [bar.get_width() for bar in panel.patches] == [0, 3, 9, -4, -1, -2]
    assert list(panel.lines[-1].get_xdata()) == [-4, 2, 7]


def test_of_many_classes_those_at_either_end_are_drawn():
    figure = matplotlib_figure.Figure()
    panel = figure.subplots()
    classes = 100
    changes = ClassChanges(1000, tuple(range(classes)), won=tuple(range(classes)), lost=(50,) * classes)
    draw_classes(panel, changes, "title")
    shown = [int(label.get_text()) for label in panel.get_yticklabels()]
    half = CLASSES_DRAWN // 2
    assert shown == [*range(half), *range(classes - half, classes)]
    assert f"{half} classes at either end of {classes} that change" in panel.get_title()


def test_by_labels_where_they_are_known_by_full_precision_otherwise(report):
    labelled = panels(report.plot())
    assert "labelled images put right and wrong" in labelled
    unlabelled = panels(dataclasses.replace(report, accuracy=None).plot())
    changes = unlabelled["agreement with FP won and lost, held out"]
    assert sum(bar.get_width() for bar in changes.patches if bar.get_width() > 0) == sum(report.held_out.classes.won)
    assert len(unlabelled["what CAT gains"].patches) == 1


def test_paper_mode_has_what_is_known_of_it(report):
    quantized, fp = (model.eval() for model in model_pair())
    paper = apply_cat(quantized, fp, images(200), config=CATConfig.paper(8))
    found = panels(paper.report.plot())
    assert not any(title.startswith("families") for title in found)
    assert sum(title.startswith("cluster") for title in found) == 4
    assert not any(title.startswith("layers") for title in found)
    nothing = {"accuracy": None, "held_out": None, "evidence": None, "layers": None, "clusters": ()}
    with pytest.raises(CATError, match="nothing to draw"):
        dataclasses.replace(report, **nothing).plot()


@pytest.mark.parametrize(("accepted", "outcome"), [(True, "used"), (False, "not used")])
def test_layers_have_their_curve_and_sizes(report, accepted, outcome):
    changes = LayerChange("first", 16, 0.25, 0.5), LayerChange("last", 10, 0.125, 1.0)
    evidence = LayersEvidence(accepted, "for a reason", layers=changes, curve=(0.5, 0.25, 0.375))
    found = panels(dataclasses.replace(report, layers=evidence).plot())
    (curve,) = found[f"layers: held-out divergence from FP ({outcome})"].lines
    assert curve.get_xydata().tolist() == [[0, 0.5], [1, 0.25], [2, 0.375]]
    unused = "" if accepted else ", not used"
    sizes = found[f"size of the correction along the network (mean over channels{unused})"]
    assert [list(line.get_ydata()) for line in sizes.lines] == [[0.25, 0.125], [0.5, 1.0]]
    alone = dataclasses.replace(report, layers=evidence, accuracy=None, held_out=None, evidence=None, clusters=())
    assert len(panels(alone.plot())) == 2


def test_values_have_no_agreement_to_draw(report):
    found = panels(dataclasses.replace(report, accuracy=None, held_out=ErrorScores(1.0, 0.5, 0.1)).plot())
    assert "families of maps (share of the weight)" in found and "what CAT gains" not in found


@pytest.mark.parametrize(("ending", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_writes_whole_files(report, tmp_path, ending, start):
    report.plot(tmp_path / f"report.{ending}")
    assert (tmp_path / f"report.{ending}").read_bytes().startswith(start)
    assert [path.name for path in tmp_path.iterdir()] == [f"report.{ending}"]


def test_bad_input(report, tmp_path, monkeypatch):
    for names in (["a", "b", "c"], "abcdefghij", 3, (name for name in NAMES), [*NAMES[:9], 9]):
        with pytest.raises(CATError, match="expected a list of 10 texts, one for each class in order"):
            report.plot(class_names=names)
    old = dataclasses.replace(report, accuracy=None, held_out=dataclasses.replace(report.held_out, classes=None))
    with pytest.raises(CATError, match="class_names are 3; expected a list of 10 texts"):
        old.plot(class_names=["a", "b", "c"])
    with pytest.raises(CATError, match=r"has the ending \.tiff8; expected one of .*png"):
        report.plot(tmp_path / "report.tiff8")
    for path in (tmp_path / "missing" / "report.png", tmp_path, ""):
        with pytest.raises(CATError, match="expected the path of a file in a folder that exists"):
            report.plot(path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CATError, match="pip install matplotlib"):
        report.plot()


def test_the_style_of_the_user_is_neither_used_nor_touched(report):
    dark = {"text.color": "white", "axes.facecolor": "black", "xtick.color": "white"}
    with matplotlib.rc_context(dark):
        before = dict(matplotlib.rcParams)
        figure = report.plot()
        assert dict(matplotlib.rcParams) == before
    panel = panels(figure)["what CAT gains"]
    assert panel.title.get_color() == "black" and panel.get_facecolor() == (1.0, 1.0, 1.0, 1.0)


def test_long_and_strange_names_can_be_drawn(report, tmp_path):
    names = ["$a_$", "n" * 60, *NAMES[2:]]
    figure = report.plot(tmp_path / "report.png", class_names=names)
    labels = {label.get_text() for panel in figure.get_axes() for label in panel.get_xticklabels()}
    assert r"\$a_\$" in labels and "n" * 19 + "…" in labels


def test_classes_that_do_not_change_are_left_out():
    figure = matplotlib_figure.Figure()
    one, none = figure.subplots(1, 2)
    draw_classes(one, ClassChanges(1000, (7,), won=(2,), lost=(0,)), "title")
    assert [label.get_text() for label in one.get_yticklabels()] == ["7"]
    assert one.get_title() == "title\n1 of 1,000 classes change"
    draw_classes(none, ClassChanges(1000, (), (), ()), "title")
    assert not none.patches


def test_positions_are_not_called_images():
    class Dense(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.stack([self.model(x), self.model(-x)], dim=1)

    quantized, fp = (Dense(model).eval() for model in model_pair())
    x = images(300)
    with torch.no_grad():
        labels = fp(x).argmax(dim=2)
    report = apply_cat(quantized, fp, x, eval_loader=[(x, labels)], config=CATConfig(num_clusters=4)).report
    found = panels(report.plot())
    assert "top-1, 600 labelled positions" in found["what CAT gains"].texts[0].get_text()
    assert found["labelled positions put right and wrong"].get_xlabel() == "positions"
    assert all("positions held out" in title for title in found if title.startswith(("cluster", "1 cluster")))
