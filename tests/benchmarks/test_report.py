import csv
import io
import json

from benchmarks.evaluate import Setting
from benchmarks.report import title, to_csv, to_table, write_report
from tests.benchmarks.rows import make_row

COLUMNS = (
    "dataset,model,method,w_bits,a_bits,seed,iters,n_calib,n_cat,n_eval,"
    "fp_top1,lq_top1,plain_affine_top1,cat_paper_top1,cat_top1,cat_delta"
)


def test_csv_has_exactly_the_columns_and_leaves_unknown_values_empty():
    text = to_csv([make_row(), make_row(cat_paper_top1=None)])
    assert text.splitlines()[0] == COLUMNS
    assert text.splitlines()[1] == "digits,resnet8,rtn,2,2,0,9,16,1024,500,99.0,90.0,91.0,92.5,93.0,3.0"
    assert [line["cat_paper_top1"] for line in csv.DictReader(io.StringIO(text))] == ["92.5", ""]


def test_table_has_mean_and_standard_deviation_over_seeds():
    seeds = [make_row(Setting("qdrop", 2, 4, seed), cat_delta=delta) for seed, delta in enumerate((1.0, 2.0, 6.0))]
    table = to_table([*seeds, make_row(cat_paper_top1=None, cat_delta=-0.25)])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert lines[0] == ["method", "bits", "FP", "low-bit", "+ plain affine", "+ CAT (paper)", "+ CAT", "gain of CAT"]
    assert lines[2][:3] == ["qdrop", "W2A4", "99.00 ± 0.00"]
    assert lines[2][-1] == "+3.00 ± 2.65"
    assert lines[3] == ["rtn", "W2A2", "99.00", "90.00", "91.00", "-", "93.00", "-0.25"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_groups_seeds_that_are_not_neighbours():
    rows = [make_row(Setting(method, 2, 2, seed)) for seed in (0, 1) for method in ("rtn", "qdrop")]
    assert [line.split()[1] for line in to_table(rows).splitlines()[2:]] == ["rtn", "qdrop"]
    assert "mean ± standard deviation of seeds 0, 1" in title(rows)


def test_all_files_hold_the_same(tmp_path):
    rows = [make_row(), make_row(Setting("qdrop", 4, 4, 1), cat_paper_top1=None)]
    write_report(tmp_path, rows)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json", "results.md"]
    assert (tmp_path / "results.csv").read_text() == to_csv(rows)
    assert json.loads((tmp_path / "results.json").read_text()) == [vars(row) for row in rows]
    assert (tmp_path / "results.md").read_text() == f"{title(rows)}\n\n{to_table(rows)}\n"
