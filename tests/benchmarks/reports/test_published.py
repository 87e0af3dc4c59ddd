"""Published figures beside ours: those of the sources, by hand, and nothing where nothing is published."""

import csv
from pathlib import Path

import pytest

import benchmarks.anchors
from benchmarks.anchors import SOURCES, load_published
from benchmarks.datasets.imagenet import VAL_IMAGES
from benchmarks.measure.protocol import Setting
from benchmarks.networks.catalogue import TIMM, TORCHVISION
from benchmarks.reports.comparison_report import to_markdown
from benchmarks.reports.published import NETWORKS, OTHERS, beside
from tests.benchmarks.rows import make_measurement

FOLDER = Path(benchmarks.anchors.__file__).parent


def run(model="resnet18", methods=("pd_quant",), dataset="imagenet", **figures):
    """Of all validation images, as far as the row says; the predictions are those of 500."""
    figures = {"n_eval": VAL_IMAGES, **figures}
    settings = [Setting(method, 2, 2, seed) for method in methods for seed in (0, 1)]
    return [make_measurement(each, won=20 + each.seed, dataset=dataset, model=model, **figures) for each in settings]


def found(network, method, w_bits, a_bits):
    return {
        each.source: (each.fp_top1, each.top1)
        for each in load_published(network)
        if (each.method, each.w_bits, each.a_bits) == (method, w_bits, a_bits)
    }


def test_figures_are_those_of_the_sources():
    """Single cells of each source's table, read there."""
    assert found("resnet18", "pd_quant", 2, 2)["PD-Quant authors"] == (71.01, 53.08)
    assert found("mnasnet", "pd_quant", 4, 2)["PD-Quant authors"] == (76.52, 38.89)
    assert found("regnetx_600m", "pd_quant", 4, 4)["PD-Quant authors"] == (73.52, 71.04)
    assert found("mobilenetv2", "qdrop", 2, 2)["QDrop authors"] == (72.49, 11.95)
    assert found("resnet50", "qdrop", 3, 3)["QDrop authors"] == (77.00, 71.28)
    assert found("resnet50", "brecq", 2, 4) == {"MQBench": (76.63, 68.39)}
    assert found("resnet18", "adaround", 4, 4) == {"MQBench": (71.06, 68.67)}


def test_tables_are_whole():
    with (FOLDER / "imagenet_ptq.csv").open() as opened:
        lines = list(csv.DictReader(opened))
    keys = [(line["network"], line["method"], line["w_bits"], line["a_bits"], line["source"]) for line in lines]
    assert len(set(keys)) == len(keys) == 6 * 4 + 6 * 4 + 3 * 3 * 4
    assert {line["source"] for line in lines} < SOURCES.keys()
    assert all(float(line["top1"]) < float(line["fp_top1"]) < 80 for line in lines)


def test_logs_of_cat_are_means_over_seeds():
    with (FOLDER / "cat_alpha.csv").open() as opened:
        lines = [line for line in csv.DictReader(opened) if line["arch"] == "resnet18" and line["alpha"] == "0.4"]
    lines = [line for line in lines if (line["w_bits"], line["a_bits"]) == ("2", "4")]
    assert len(lines) == 3
    (published,) = [
        each
        for each in load_published("resnet18")
        if each.source == "CAT authors" and (each.w_bits, each.a_bits) == (2, 4)
    ]
    assert published.top1 == pytest.approx(sum(float(line["baseline_top1"]) for line in lines) / 3)
    assert published.cat_gain == pytest.approx(sum(float(line["gain"]) for line in lines) / 3, abs=1e-6)
    assert published.fp_top1 is None


def test_table_holds_ours_over_seeds_and_theirs_below():
    lines = beside(run(methods=("rtn", "pd_quant", "qdrop"))).lines
    assert [line[:2] for line in lines[1:]] == [
        ("pd_quant W2A2", "this run"),
        ("pd_quant W2A2", "PD-Quant authors"),
        ("pd_quant W2A2", "CAT authors"),
        ("qdrop W2A2", "this run"),
        ("qdrop W2A2", "QDrop authors"),
    ]
    # Of 500 images FP misses 5 and the low-bit network 50; paper's CAT wins 25 and loses 12, the output
    # alone 15 and 5, the default 20 or 21 and 5.
    assert lines[1][2:] == ("99.00", "90.00", "-9.00", "+2.60", "+2.00", "+3.10")
    assert lines[2][2:] == ("71.01", "53.08", "-17.93", "-", "-", "-")
    assert lines[5][2:] == ("71.06", "51.69", "-19.37", "-", "-", "-")


def test_markdown_ends_with_it_and_names_the_sources():
    text = to_markdown(run())
    assert "\n\nBeside published figures:\n\n| quantized by " in text
    assert "compare differences and gains, not top-1." in text
    assert "- PD-Quant authors: hustvl/PD-Quant, README.md" in text and "- QDrop authors" not in text
    assert text.startswith("Top-1 in percent on 50,000 test images: resnet18 on imagenet")


def test_what_was_not_measured_is_a_dash():
    lines = beside(run(cat_paper=False)).lines
    assert lines[1][5:] == ("-", "+2.00", "+3.10")


@pytest.mark.parametrize("model", OTHERS)
def test_networks_that_only_resemble_the_papers_have_a_note(model):
    text = to_markdown(run(model))
    assert "Beside" not in text
    assert text.endswith(f"No published figures for these. {OTHERS[model]}")


def test_other_methods_have_a_note_alone():
    assert beside(run(methods=("rtn",))).lines == []


@pytest.mark.parametrize("model", ["resnet18", *OTHERS])
@pytest.mark.parametrize("n_eval", [15, VAL_IMAGES - 1])
def test_other_images_than_the_papers_are_not_compared(model, n_eval):
    assert beside(run(model, n_eval=n_eval)) is None
    assert "ublished" not in to_markdown(run(model, n_eval=n_eval))


@pytest.mark.parametrize(("model", "dataset"), [("deit_tiny_patch16_224", "imagenet"), ("resnet18", "cifar10")])
def test_nothing_is_said_of_what_the_papers_do_not_speak_of(model, dataset):
    assert beside(run(model, dataset=dataset)) is None
    assert "published" not in to_markdown(run(model, dataset=dataset))


def test_names_are_networks_on_both_sides():
    assert NETWORKS.keys() | OTHERS.keys() < {*TORCHVISION, *TIMM}
    assert all(len(load_published(name)) > 10 for name in NETWORKS.values())
