"""The table checked by hand."""

from benchmarks.measure.nulls import NullFit
from benchmarks.reports.nulls_report import nulls_table, to_markdown, write_report


def fit(case, images, draw, change=None, layers=False):
    """Accepted where a change is given."""
    figures = {"n_eval": 3000, "lq_agreement": 70.0, "agreement": 70.0 + (change or 0), "change": change or 0.0}
    return NullFit(case=case, images=images, draw=draw, accepted=change is not None, layers=layers, **figures)


FITS = [
    fit("positions", 25, 0),
    fit("positions", 25, 1, -2.5),
    fit("positions", 25, 2, 1.0, layers=True),
    fit("positions", 25, 3, 0.0),
    fit("positions", 200, 0),
    fit("plain", 1024, 0, 0.25),
]


def test_accepted_fits_are_counted_and_the_others_do_not_count_as_changes():
    assert nulls_table(FITS).splitlines() == [
        "| case      | images | draws | accepted | of layers | worst change | mean change |",
        "| --------- | -----: | ----: | -------: | --------: | -----------: | ----------: |",
        "| positions |     25 |     4 |        3 |         1 |        -2.50 |       -0.50 |",
        "| positions |    200 |     1 |        0 |         0 |            - |           - |",
        "| plain     |  1,024 |     1 |        1 |         0 |        +0.25 |       +0.25 |",
    ]


def test_files_hold_the_table_and_every_fit(tmp_path):
    assert write_report(tmp_path, FITS) == {"results.csv": False, "results.md": False}
    assert (tmp_path / "results.md").read_text() == to_markdown(FITS) + "\n"
    lines = (tmp_path / "results.csv").read_text().splitlines()
    assert lines[0] == "case,images,draw,accepted,layers,n_eval,lq_agreement,agreement,change"
    assert lines[2] == "positions,25,1,True,False,3000,70.0,67.5,-2.5"
    assert len(lines) == 1 + len(FITS)
    assert write_report(tmp_path, FITS) == {"results.csv": True, "results.md": True}
