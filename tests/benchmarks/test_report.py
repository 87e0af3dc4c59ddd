import csv
import io
import json

from benchmarks.evaluate import Setting
from benchmarks.report import title, to_csv, to_markdown, to_table, write_environment, write_report
from tests.benchmarks.rows import make_measurement, make_row

COLUMNS = (
    "dataset,model,method,w_bits,a_bits,seed,iters,n_calib,n_cat,n_eval,"
    "fp_top1,lq_top1,plain_affine_top1,cat_paper_top1,cat_top1,cat_delta"
)

NOTE = "With 1,024 images the default of CAT is the paper's setting (64 clusters), so both columns agree."


def test_csv_has_exactly_the_columns_and_leaves_unknown_values_empty():
    text = to_csv([make_row(), make_row(cat_paper_top1=None)])
    assert text.splitlines()[0] == COLUMNS
    assert text.splitlines()[1] == "digits,resnet8,rtn,2,2,0,9,16,1024,500,99.0,90.0,91.0,92.5,93.0,3.0"
    assert [line["cat_paper_top1"] for line in csv.DictReader(io.StringIO(text))] == ["92.5", ""]


def test_table_has_mean_and_standard_deviation_over_seeds():
    deltas = (1.0, 2.0, 6.0)
    seeds = [make_measurement(Setting("qdrop", 2, 4, seed), cat_delta=delta) for seed, delta in enumerate(deltas)]
    table = to_table([*seeds, make_measurement(cat_paper_top1=None, cat_delta=-0.25)])
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    scores = ["FP", "low-bit", "+ plain affine", "+ CAT (paper)", "+ CAT"]
    assert lines[0] == ["method", "bits", *scores, "gain of CAT", "95 % interval"]
    assert lines[2][:3] == ["qdrop", "W2A4", "99.00 ± 0.00"]
    assert lines[2][-2] == "+3.00 ± 2.65"
    assert lines[3][:-1] == ["rtn", "W2A2", "99.00", "90.00", "91.00", "-", "93.00", "-0.25"]
    assert len({len(line) for line in table.splitlines()}) == 1


def test_table_groups_seeds_that_are_not_neighbours():
    measured = [make_measurement(Setting(method, 2, 2, seed)) for seed in (0, 1) for method in ("rtn", "qdrop")]
    assert [line.split()[1] for line in to_table(measured).splitlines()[2:]] == ["rtn", "qdrop"]
    assert "mean ± standard deviation of seeds 0, 1" in title([measurement.row for measurement in measured])


def test_interval_is_that_of_the_paired_mean():
    """20 won and 5 lost of 500: mean 3 points, standard error sqrt((25 / 500 - 0.03 ** 2) / 500)."""
    error = 100 * ((25 / 500 - 0.03**2) / 500) ** 0.5
    low, high = map(float, to_table([make_measurement()]).splitlines()[2].split("|")[-2].split(" to "))
    assert abs(low - (3 - 1.96 * error)) < 0.15 and abs(high - (3 + 1.96 * error)) < 0.15


def test_interval_over_seeds_is_of_each_images_mean():
    """The same images won at every seed tell no more than one seed; other images tell more."""
    alike = to_table([make_measurement(Setting("rtn", 2, 2, seed)) for seed in (0, 1)])
    single = to_table([make_measurement()])
    assert alike.splitlines()[2].split("|")[-2].split() == single.splitlines()[2].split("|")[-2].split()


def test_all_files_hold_the_same(tmp_path):
    measured = [make_measurement(), make_measurement(Setting("qdrop", 4, 4, 1), cat_paper_top1=None)]
    rows = [measurement.row for measurement in measured]
    write_report(tmp_path, measured)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["results.csv", "results.json", "results.md"]
    assert (tmp_path / "results.csv").read_text() == to_csv(rows)
    assert json.loads((tmp_path / "results.json").read_text()) == [vars(row) for row in rows]
    assert (tmp_path / "results.md").read_text() == to_markdown(measured) + "\n"


def test_environment_stays_that_of_the_first_call_but_for_the_seconds(tmp_path):
    path = tmp_path / "environment.json"
    write_environment(tmp_path, {"command": "first", "finished": "then", "seconds": 3.0})
    write_environment(tmp_path, {"command": "second", "finished": "now", "seconds": 5.0})
    assert json.loads(path.read_text()) == {"command": "first", "finished": "then", "seconds": 5.0}
    path.write_text('{"comm')
    write_environment(tmp_path, {"command": "third", "finished": "now", "seconds": 5.0})
    assert json.loads(path.read_text())["command"] == "third"
