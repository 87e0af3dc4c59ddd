import dataclasses
import json
import re

import pytest

from cat_plugin import CATConfig, CATError, apply_cat
from cat_plugin.fitting.evidence import Candidate, Evidence
from cat_plugin.fitting.scores import ErrorScores, HeldOutScores
from cat_plugin.layers.evidence import Closeness, LayerChange, LayersEvidence
from cat_plugin.report.layers import LayerCount
from cat_plugin.report.report import CATReport
from tests.cat_plugin.helpers import images, model_pair

SCORES = HeldOutScores(60.0, 62.5, 0.3, 0.2, 1.0, 4.0)
EVIDENCE = Evidence(
    40, 0.01, 0.002, 5.0, True, "on held-out images, all is well", (Candidate("affine", 0.1, 0.02, 0.75),)
)
LAYERS = LayersEvidence(
    True,
    "for a reason",
    images=2000,
    layers=(LayerChange("first", 16, 0.2, 0.3), LayerChange("last", 10, 0.5, 0.1)),
    unreached=tuple("abcdef"),
    rate="far",
    share=0.75,
    epochs=3,
    steps=7,
    plain=Closeness(0.5, 60.0),
    output=Closeness(0.4, 61.0),
    inside=Closeness(0.2, 62.0),
    both=Closeness(0.1, None),
    operations=1234,
    seconds=12.3,
)
REPORT = CATReport(
    images=2000,
    num_clusters=1,
    cluster_sizes=(2000,),
    held_out=SCORES,
    added_parameters=1234,
    added_bytes=4936,
    collect_seconds=1.26,
    fit_seconds=0.34,
    evidence=EVIDENCE,
)
GAINED = "agreement with FP 60.00 -> 62.50 % (+2.50, 95 % CI +1.00 to +4.00), KL(FP || output) 0.3000 -> 0.2000 nats"
COST = "  cost: 1,234 numbers, 4,936 bytes{}; 1.3 s to run the models, 0.3 s to fit"


def fitted(config=None, labels=False, n_images=400, classes=10):
    quantized, fp = (model.eval() for model in model_pair(classes))
    x = images(n_images)
    eval_loader = [(x, fp(x).argmax(dim=1))] if labels else None
    return apply_cat(quantized, fp, x, config=config, eval_loader=eval_loader).report


def test_what_is_printed():
    expected = [
        "CAT fitted on 2,000 images: 1 cluster",
        "  on held-out images, all is well",
        "  tried (fall of the held-out softened KL in nats, share of the weight):",
        "    affine                        +0.1000 +- 0.0200    75%",
        f"  held out: {GAINED}",
        COST.format(""),
    ]
    assert str(REPORT) == repr(REPORT) == "\n".join(expected)


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"evidence": None}, ["CAT fitted on 2,000 images, 1 cluster"]),
        (
            {"evidence": None, "num_clusters": 3, "cluster_sizes": (7, 1990, 3)},
            ["CAT fitted on 2,000 images, 3 clusters of 3 to 1990 images each"],
        ),
        (
            {"positions": 9000, "num_clusters": 2, "cluster_sizes": (1000, 8000)},
            ["CAT fitted on 2,000 images (9,000 positions): 2 clusters of 1000 to 8000 positions each"],
        ),
        (
            {"evidence": dataclasses.replace(EVIDENCE, accepted=False, candidates=())},
            ["CAT fitted on 2,000 images: the model is left as it is", "  on held-out images, all is well"],
        ),
        (
            {"held_out": ErrorScores(1.0, 0.5, 0.1)},
            ["  held out: squared error to FP 1 -> 0.5 (fall 0.5 +- 0.1)"],
        ),
        (
            {"layers": LAYERS},
            [
                "CAT fitted on 2,000 images: 2 layers corrected; output: 1 cluster",
                "  layers: for a reason",
                "    model               0.5000, 60.00 % agree",
                "    output only         0.4000, 61.00 % agree",
                "    layers              0.2000, 62.00 % agree",
                "    layers and output   0.1000",
                "  fitted in 3 epochs of 7 steps, 12 s; rate 'far', share 0.75; 1,234 multiply-adds an image",
                "    last                          0.500  0.100",
                "    first                         0.200  0.300",
                "  no gradient reaches 6 layers: a, b, c, d, e, ...",
                "  output: on held-out images, all is well",
            ],
        ),
        (
            {"layers": LAYERS, "evidence": dataclasses.replace(EVIDENCE, accepted=False)},
            ["CAT fitted on 2,000 images: 2 layers corrected; output: left as it is"],
        ),
        (
            {"layers": LayersEvidence(False, "too few"), "evidence": dataclasses.replace(EVIDENCE, accepted=False)},
            ["CAT fitted on 2,000 images: the model is left as it is", "  layers: too few"],
        ),
        ({"held_out": None}, ["  held out: nothing, the images are too few to split"]),
        (
            {"model_bytes": 493_600},
            [COST.format(" on top of the 493,600 bytes of the model at its bit widths (1.00%)")],
        ),
        ({"warnings": ("one", "two")}, ["  warning: one", "  warning: two"]),
        ({"quantized_layers": LayerCount(2, 3)}, ["  model: 2 of 3 layers look quantized"]),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_lines_of_other_outcomes(changes, lines):
    printed = str(dataclasses.replace(REPORT, **changes)).splitlines()
    assert [line for line in lines if line not in printed] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "2,000 images, 1 cluster, agreement with FP 60.00 -> 62.50 %, KL 0.3000 -> 0.2000 nats"),
        ({"num_clusters": 2, "cluster_sizes": (1, 2), "held_out": None}, "2,000 images, 2 clusters"),
        (
            {"evidence": dataclasses.replace(EVIDENCE, accepted=False), "held_out": None},
            "2,000 images, left as it is",
        ),
        ({"held_out": ErrorScores(1.0, 0.5, 0.1)}, "2,000 images, 1 cluster, squared error to FP 1 -> 0.5"),
        (
            {"layers": LAYERS, "evidence": dataclasses.replace(EVIDENCE, accepted=False), "held_out": None},
            "2,000 images, 2 layers, output left as it is",
        ),
    ],
    ids=["accepted", "clusters", "declined", "values", "layers"],
)
def test_summary_is_one_line(changes, expected):
    assert dataclasses.replace(REPORT, **changes).summary() == expected


@pytest.mark.parametrize(("num_clusters", "sizes"), [(0, ()), (2, (5,)), (1, (5, 5))])
def test_every_cluster_has_its_size(num_clusters, sizes):
    message = f"num_clusters is {num_clusters}, and there are {len(sizes)} cluster_sizes; expected one size for each"
    with pytest.raises(CATError, match=message):
        dataclasses.replace(REPORT, num_clusters=num_clusters, cluster_sizes=sizes)


def test_report_round_trip():
    report = fitted(labels=True)
    assert CATReport.from_dict(report.to_dict()) == report
    assert CATReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report
    assert CATReport.from_dict(dataclasses.asdict(report)) == report
    little = fitted(n_images=1)
    assert little.held_out is None and CATReport.from_dict(json.loads(json.dumps(little.to_dict()))) == little
    with pytest.raises(CATError, match=re.escape("the report has unknown fields ['colour'] and lacks []")):
        CATReport.from_dict({**report.to_dict(), "colour": 3})


def test_reports_of_earlier_versions_load_and_broken_ones_do_not():
    report = fitted(CATConfig.paper(4))
    values = report.to_dict()
    old = {**values, "held_out": {**values["held_out"]}}
    del old["clusters"], old["held_out"]["classes"]
    loaded = CATReport.from_dict(old)
    assert loaded.clusters == () and loaded.held_out.classes is None
    first = values["clusters"][0]
    changes = values["held_out"]["classes"]
    for broken in (
        {"cluster_sizes": []},
        {"clusters": [{**first, "fp": first["fp"][1:]}]},
        {"clusters": [{**first, "classes": [-1, *first["classes"][1:]]}]},
        {"held_out": {**values["held_out"], "classes": {**changes, "won": [*changes["won"], 1]}}},
        {"held_out": {**values["held_out"], "classes": {**changes, "num_classes": 1}}},
    ):
        with pytest.raises(CATError, match=r"length|size|labels"):
            CATReport.from_dict({**values, **broken})


def test_a_report_with_many_classes_is_printed_short():
    report = fitted(CATConfig.paper(4), classes=300)
    assert report.held_out.classes.num_classes == 300
    assert "ClassChanges" not in repr(report.held_out)
