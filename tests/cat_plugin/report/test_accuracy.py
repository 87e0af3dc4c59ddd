import dataclasses
import json

from cat_plugin.metrics import ClassChanges, PairedStatistics
from cat_plugin.report.accuracy import AccuracyReport
from cat_plugin.saving.plain import from_plain

REPORT = AccuracyReport(
    images=1200,
    top_k=3,
    fp_top1=90.0,
    quantized_top1=70.0,
    cat_top1=75.5,
    fp_top5=99.0,
    quantized_top5=95.0,
    cat_top5=96.0,
    paired=PairedStatistics(1200, 5.5, 3.25, 7.75, 0.00123, 100, 34),
    classes=ClassChanges(7, (1, 5), (60, 40), (30, 4)),
)
PRINTED = (
    "FP 90.00, quantized 70.00, with CAT 75.50 (+5.50, 95 % CI +3.25 to +7.75, p = 0.0012, 100 won, 34 lost); "
    "top-3: 99.00, 95.00, 96.00"
)


def test_what_is_printed():
    assert str(REPORT) == f"top-1 of 1,200 images: {PRINTED}"
    dense = dataclasses.replace(REPORT, positions=48_000)
    assert str(dense) == f"top-1 of 48,000 positions of 1,200 images: {PRINTED}"


def test_fields_as_json_and_back():
    values = json.loads(json.dumps(REPORT.to_dict()))
    assert values["paired"]["lost"] == 34 and values["classes"]["labels"] == [1, 5]
    assert values.keys() == {field.name for field in dataclasses.fields(AccuracyReport)}
    assert from_plain(AccuracyReport, values, "the report") == REPORT
    del values["positions"], values["classes"]
    assert from_plain(AccuracyReport, values, "the report") == dataclasses.replace(REPORT, classes=None)


def test_classes_are_not_printed_one_by_one():
    assert "ClassChanges" not in repr(REPORT)
